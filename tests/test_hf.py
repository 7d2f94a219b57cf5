"""Ordinary Transformers code on GPTQ folders: the dequantised model's logits, and saving changes nothing."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, pipeline
from transformers.quantizers import auto

from gptq_models import FAMILIES, edit_json, write_quantized
from quantmill import hf
from quantmill.errors import BadCheckpoint, BadRequest, UnsupportedModel
from quantmill.runtime.linear import QuantLinear, quant_linears
from quantmill.types import CheckpointFormat, QuantConfig
from tiny_models import byte_level_tokenizer, tiny_model

pytestmark = pytest.mark.usefixtures("exact_products")

CONFIG = QuantConfig(bits=4, group_size=32)
IDS = torch.randint(2, 320, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def registered():
    hf.register()
    yield
    hf.unregister()


@pytest.fixture
def complaints():
    """Everything that Transformers logs as a warning or worse."""
    records: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, device_map="auto", **options)


def agree(model, twin) -> None:
    with torch.inference_mode():
        got = model(IDS.to(model.device)).logits.cpu()
        torch.testing.assert_close(got, twin(IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_dequantised_models(tmp_path, family, complaints):
    twin = write_quantized(tmp_path, tiny_model(family, **FAMILIES[family]), CONFIG)
    model = load(tmp_path, dtype=torch.float32)
    assert len(quant_linears(model)) == 2 * (4 if family == "phi3" else 7)
    agree(model, twin)
    assert not complaints


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [-1, 64, 8])
def test_every_width_and_group(tmp_path, bits, group):
    twin = write_quantized(tmp_path, tiny_model("llama"), QuantConfig(bits=bits, group_size=group))
    agree(load(tmp_path, dtype=torch.float32), twin)


@pytest.mark.parametrize("written", CheckpointFormat)
@pytest.mark.parametrize("label", CheckpointFormat)
def test_zeros_are_probed_not_believed(tmp_path, written, label, complaints):
    twin = write_quantized(
        tmp_path, tiny_model("llama"), QuantConfig(group_size=32, checkpoint_format=written)
    )
    quant = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    edit_json(
        tmp_path / "config.json", quantization_config={**quant, "checkpoint_format": label, "format": label}
    )
    model = load(tmp_path, dtype=torch.float32)
    assert {layer.checkpoint_format for layer in quant_linears(model).values()} == {written}
    agree(model, twin)
    assert not complaints


def test_true_act_order(tmp_path):
    twin = write_quantized(tmp_path, tiny_model("mistral", sliding_window=8), CONFIG, shuffled=True)
    agree(load(tmp_path, dtype=torch.float32), twin)


def test_qwen2_keeps_its_biases(tmp_path):
    model = write_quantized(tmp_path, tiny_model("qwen2"), CONFIG)
    layer = load(tmp_path).model.layers[1].self_attn.k_proj
    assert isinstance(layer, QuantLinear)
    assert torch.equal(layer.bias.cpu().float(), model.model.layers[1].self_attn.k_proj.bias)


def test_zero_biases_that_the_model_lacks_are_taken(tmp_path, complaints):
    """AutoGPTQ wrote one for every linear."""
    twin = write_quantized(tmp_path, tiny_model("llama"), CONFIG)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for name in [n for n in tensors if n.endswith(".scales")]:
        tensors[name.replace("scales", "bias")] = torch.zeros(tensors[name].shape[1]).half()
    save_file(tensors, file, metadata={"format": "pt"})
    agree(load(tmp_path, dtype=torch.float32), twin)
    assert not complaints


def test_tied_embeddings_survive(tmp_path, complaints):
    twin = write_quantized(tmp_path / "a", tiny_model("llama", tie_word_embeddings=True), CONFIG)
    model = load(tmp_path / "a", dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    agree(model, twin)
    load(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert "lm_head.weight" not in load_file(tmp_path / "b" / "model.safetensors")
    assert not complaints


def test_quantised_head(tmp_path, complaints):
    twin = write_quantized(tmp_path, tiny_model("llama"), CONFIG, head=True)
    model = load(tmp_path, dtype=torch.float32)
    assert isinstance(model.lm_head, QuantLinear)
    agree(model, twin)
    assert not complaints


def test_modules_left_alone_are_read_from_the_file(tmp_path, complaints):
    """As with modules_in_block_to_quantize or `dynamic` rules that skip."""
    twin = write_quantized(
        tmp_path, tiny_model("llama"), CONFIG, skip=("mlp.down_proj", "1.self_attn.q_proj")
    )
    quant = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    quant |= {"dynamic": {"-:down_proj": {}}, "modules_in_block_to_quantize": [["self_attn.q_proj"]]}
    edit_json(tmp_path / "config.json", quantization_config=quant)
    model = load(tmp_path, dtype=torch.float32)
    assert len(quant_linears(model)) == 14 - 3
    agree(model, twin)
    assert not complaints


def test_a_model_without_head(tmp_path):
    twin = write_quantized(tmp_path, tiny_model("llama"), CONFIG, head=True)
    base = AutoModel.from_pretrained(tmp_path)
    assert len(quant_linears(base)) == 14
    with torch.inference_mode():
        got, wanted = base(IDS).last_hidden_state, twin.model(IDS).last_hidden_state
    torch.testing.assert_close(got.float(), wanted, rtol=1e-2, atol=1e-2)


def test_a_state_dict_in_hand(tmp_path):
    twin = write_quantized(tmp_path, tiny_model("llama"), CONFIG)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    model = transformers.LlamaForCausalLM.from_pretrained(
        None, config=config, state_dict=tensors, dtype=torch.float32
    )
    assert len(quant_linears(model)) == 14
    agree(model, twin)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "phi3"])
def test_saving_and_loading_again_changes_nothing(tmp_path, family, complaints):
    config = QuantConfig(bits=3, group_size=32)
    twin = write_quantized(tmp_path / "a", tiny_model(family, **FAMILIES[family]), config, shuffled=True)
    load(tmp_path / "a").save_pretrained(tmp_path / "b")
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in "ab")
    assert before.keys() == after.keys()
    assert all(before[k].dtype == after[k].dtype and torch.equal(before[k], after[k]) for k in before)
    quants = [json.loads((tmp_path / f / "config.json").read_text())["quantization_config"] for f in "ab"]
    assert quants[0] == quants[1]
    agree(load(tmp_path / "b", dtype=torch.float32), twin)
    assert not complaints


@pytest.mark.parametrize("size", ["20KB", "1GB"])
def test_shards(tmp_path, size):
    twin = write_quantized(tmp_path / "a", tiny_model("llama"), CONFIG)
    load(tmp_path / "a").save_pretrained(tmp_path / "b", max_shard_size=size)
    assert (tmp_path / "b" / "model.safetensors.index.json").exists() == (size == "20KB")
    agree(load(tmp_path / "b", dtype=torch.float32), twin)


def test_generate_and_pipeline(tmp_path, complaints):
    twin = write_quantized(tmp_path, tiny_model("mistral", sliding_window=8), CONFIG)
    byte_level_tokenizer().save_pretrained(tmp_path)
    model = load(tmp_path, dtype=torch.float32)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 1}
    ids = IDS[:1]
    got = model.generate(ids.to(model.device), **options).cpu()
    assert torch.equal(got, twin.generate(ids, **options))
    pipe = pipeline("text-generation", model=str(tmp_path), device_map="auto", dtype=torch.float32)
    config = transformers.GenerationConfig(
        max_new_tokens=12, do_sample=True, temperature=0.7, top_p=0.95, top_k=40, repetition_penalty=1.1
    )
    answer = pipe("the cat sat", generation_config=config)[0]["generated_text"]
    assert answer.startswith("the cat sat")
    assert len(answer) > len("the cat sat")
    # About the test's own tokenizer, from Transformers before 5.23.
    assert not [c for c in complaints if "clean_up_tokenization_spaces" not in c]


def test_revision_from_the_shared_cache(tmp_path):
    """The layout that huggingface_hub keeps: two branches of one repository."""
    repo = tmp_path / "models--me--tiny-GPTQ"
    twins = {}
    for commit, branch, bits in (("a" * 40, "main", 4), ("b" * 40, "gptq-8bit-32g-actorder_True", 8)):
        config = QuantConfig(bits=bits, group_size=32)
        twins[branch] = write_quantized(
            repo / "snapshots" / commit, tiny_model("mistral", sliding_window=8), config
        )
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / branch).write_text(commit)
    for branch, twin in twins.items():
        model = load(
            "me/tiny-GPTQ", revision=branch, cache_dir=tmp_path, local_files_only=True, dtype=torch.float32
        )
        agree(model, twin)


def test_dequantize(tmp_path):
    twin = write_quantized(tmp_path, tiny_model("qwen2"), CONFIG)
    model = load(tmp_path, dtype=torch.float32)
    plain = model.dequantize()
    assert not quant_linears(plain)
    agree(plain, twin)


def test_a_users_own_config_object_is_accepted(tmp_path):
    twin = write_quantized(tmp_path, tiny_model("llama"), CONFIG)
    with pytest.warns(UserWarning, match="You passed `quantization_config`"):
        model = load(
            tmp_path,
            dtype=torch.float32,
            quantization_config=transformers.GPTQConfig(bits=4, backend="torch"),
        )
    agree(model, twin)


def test_register_is_idempotent_and_can_be_undone():
    tables = (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    hf.unregister()
    theirs = [table["gptq"] for table in tables]
    hf.register()
    ours = [table["gptq"] for table in tables]
    hf.register()
    assert [table["gptq"] for table in tables] == ours
    assert not set(ours) & set(theirs)
    hf.unregister()
    hf.unregister()
    assert [table["gptq"] for table in tables] == theirs


def test_importing_the_door_loads_nothing():
    code = "import sys, quantmill.hf; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


class TestRefusals:
    def refused(self, folder, error, match, **changes):
        write_quantized(folder, tiny_model("llama"), CONFIG)
        quant = json.loads((folder / "config.json").read_text())["quantization_config"] | changes
        edit_json(folder / "config.json", quantization_config=quant)
        with pytest.raises(error, match=match):
            load(folder)

    def test_marlin_words(self, tmp_path):
        self.refused(tmp_path, UnsupportedModel, "is_marlin_format", is_marlin_format=True)

    def test_another_format(self, tmp_path):
        self.refused(tmp_path, UnsupportedModel, "checkpoint_format is 'marlin'", checkpoint_format="marlin")

    def test_a_config_that_lies_about_the_group(self, tmp_path):
        self.refused(
            tmp_path,
            BadCheckpoint,
            r"down_proj.qzeros is \(3, 8\); 4 bits with group size 16 need",
            group_size=16,
        )

    def test_a_config_that_lies_about_the_bits(self, tmp_path):
        self.refused(tmp_path, BadCheckpoint, "qweight", bits=8)

    def test_a_missing_tensor(self, tmp_path):
        write_quantized(tmp_path, tiny_model("llama"), CONFIG)
        tensors = load_file(tmp_path / "model.safetensors")
        del tensors["model.layers.0.mlp.up_proj.qzeros"]
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(BadCheckpoint, match=r"0\.mlp\.up_proj\.qzeros is missing"):
            load(tmp_path)

    def test_a_module_that_the_model_does_not_have(self, tmp_path):
        write_quantized(tmp_path, tiny_model("llama"), CONFIG)
        edit_json(tmp_path / "config.json", num_hidden_layers=1)
        with pytest.raises(UnsupportedModel, match=r"quantised model\.layers\.1"):
            load(tmp_path)

    def test_pickled_weights(self, tmp_path):
        write_quantized(tmp_path, tiny_model("llama"), CONFIG)
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(BadCheckpoint, match="opens no pickle"):
            load(tmp_path)

    def test_quantising_through_transformers(self, tiny_llama):
        with pytest.raises(BadRequest, match="quantmill quantize"):
            load(tiny_llama, quantization_config=transformers.GPTQConfig(bits=4))
