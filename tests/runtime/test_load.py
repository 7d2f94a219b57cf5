"""Folders of every age load; broken ones are refused in one line of ours."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.quantizers import auto
from transformers.utils import logging as hf_logging

from gptq_models import edit_json, write_quantized
from quantmill.errors import BadCheckpoint, BadRequest, SourceNotFound, UnsupportedModel
from quantmill.runtime.linear import quant_linears
from quantmill.runtime.load import load_model, load_tokenizer
from quantmill.types import CheckpointFormat, QuantConfig
from tiny_models import byte_level_tokenizer, tiny_model

pytestmark = pytest.mark.usefixtures("exact_products")

CONFIG = QuantConfig(bits=4, group_size=32)
IDS = torch.randint(2, 320, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path):
    """A quantised folder with its tokenizer."""
    write_quantized(tmp_path / "new", tiny_model("llama"), CONFIG)
    byte_level_tokenizer().save_pretrained(tmp_path / "new")
    return tmp_path / "new"


def agree(model, twin) -> None:
    with torch.inference_mode():
        torch.testing.assert_close(model(IDS).logits.float(), twin(IDS).logits, rtol=1e-5, atol=1e-5)


def rewrite(folder, change) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_quantised_folder_on_a_cpu_computes_in_float32(tmp_path, capfd):
    twin = write_quantized(tmp_path, tiny_model("mistral", sliding_window=8), CONFIG)
    model = load_model(tmp_path, device="cpu")
    assert model.dtype == torch.float32
    assert not model.training
    agree(model, twin)
    assert capfd.readouterr() == ("", "")


def test_plain_folder(tiny_llama):
    model = load_model(tiny_llama)
    assert not quant_linears(model)
    assert model.dtype == torch.float32 or torch.cuda.is_available()


@pytest.mark.parametrize(("dtype", "wanted"), [("bfloat16", torch.bfloat16), (torch.float16, torch.float16)])
def test_dtype_can_be_asked_for(folder, dtype, wanted):
    model = load_model(folder, device="cpu", dtype=dtype)
    assert model.dtype == model(IDS).logits.dtype == wanted
    assert next(iter(quant_linears(model).values())).scales.dtype == torch.float16


@pytest.mark.parametrize("written", CheckpointFormat)
def test_folder_of_the_autogptq_era(tmp_path, written):
    """Its own file name, quantize_config.json alone, keys of 2023, a v1 label or none."""
    config = QuantConfig(bits=4, group_size=32, checkpoint_format=written)
    twin = write_quantized(tmp_path / "old", tiny_model("llama"), config, shuffled=True)
    old = tmp_path / "old"
    (old / "model.safetensors").rename(old / "gptq_model-4bit-32g.safetensors")
    edit_json(old / "config.json", quantization_config=None, dtype=None, torch_dtype="float16")
    keys = {
        "bits": 4,
        "group_size": 32,
        "damp_percent": 0.1,
        "desc_act": True,
        "static_groups": False,
        "sym": True,
        "true_sequential": True,
        "model_name_or_path": None,
        "model_file_base_name": "gptq_model-4bit-32g",
    }
    (old / "quantize_config.json").write_text(json.dumps(keys))
    model = load_model(old, device="cpu", cache=tmp_path / "cache")
    assert len(quant_linears(model)) == 14
    assert {layer.checkpoint_format for layer in quant_linears(model).values()} == {written}
    agree(model, twin)


def test_transformers_tables_are_left_as_they_were(folder):
    before = dict(auto.AUTO_QUANTIZER_MAPPING), hf_logging.get_verbosity()
    load_model(folder, device="cpu")
    assert (dict(auto.AUTO_QUANTIZER_MAPPING), hf_logging.get_verbosity()) == before


def test_what_was_loaded_can_be_saved(folder, tmp_path):
    model = load_model(folder, device="cpu", dtype="float16")
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_tokenizer(folder):
    assert load_tokenizer(folder).decode(load_tokenizer(folder)("the cat").input_ids) == "the cat"


def test_missing_folder(tmp_path):
    with pytest.raises(SourceNotFound, match="is no folder"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(SourceNotFound, match="is no folder"):
        load_tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file(folder, name):
    (folder / name).unlink()
    with pytest.raises(BadCheckpoint):
        load_model(folder)


def test_missing_tokenizer(tiny_llama, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "bare", ignore=shutil.ignore_patterns("token*", "*.jinja"))
    with pytest.raises(BadCheckpoint, match=r"has none of tokenizer\.json, "):
        load_tokenizer(tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").write_text("{")
    with pytest.raises((BadCheckpoint, UnsupportedModel)) as caught:
        load_tokenizer(tmp_path / "bare")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [4, 100, 20_000])
def test_truncated_weights(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(BadCheckpoint) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_missing_tensor_is_no_noise(folder):
    rewrite(folder, lambda tensors: tensors.pop("model.layers.1.input_layernorm.weight"))
    with pytest.raises(BadCheckpoint, match=r"1 tensors are missing.*layers\.1\.input_layernorm"):
        load_model(folder, device="cpu")


def test_misshapen_tensor(folder, tiny_llama, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "plain")
    for place in (folder, tmp_path / "plain"):
        rewrite(place, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(65)}))
        with pytest.raises(BadCheckpoint, match=r"misshapen.*model\.norm\.weight|norm\.weight is \(65,\)"):
            load_model(place, device="cpu")


def test_unused_tensor_is_mentioned(folder, caplog):
    rewrite(folder, lambda tensors: tensors.update({"extra.weight": torch.zeros(2)}))
    with caplog.at_level(logging.INFO, "quantmill"):
        load_model(folder, device="cpu")
    assert "extra.weight" in caplog.text


def test_choice_of_kernels_is_logged(folder, caplog):
    with caplog.at_level(logging.INFO, "quantmill"):
        load_model(folder, device="cpu")
    assert "14 linears: " in caplog.text


def test_unknown_architecture(folder):
    edit_json(folder / "config.json", model_type="abacus")
    with pytest.raises(UnsupportedModel, match=r"Transformers refuses it.*abacus"):
        load_model(folder, device="cpu")


def test_another_method_is_refused_before_transformers_asks_for_packages(folder):
    quant = {"quant_method": "hqq", "bits": 4, "group_size": 32}
    edit_json(folder / "config.json", quantization_config=quant)
    with pytest.raises(UnsupportedModel, match="quant_method is 'hqq'"):
        load_model(folder, device="cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:0"])
def test_on_a_gpu_in_float16(tmp_path, device):
    twin = write_quantized(tmp_path, tiny_model("mistral", sliding_window=8), CONFIG, shuffled=True)
    model = load_model(tmp_path, device=device)
    assert (model.device.type, model.dtype) == ("cuda", torch.float16)
    with torch.inference_mode():
        got = model(IDS.cuda()).logits.float().cpu()
        torch.testing.assert_close(got, twin(IDS).logits, rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_where_there_is_none(folder):
    with pytest.raises(BadRequest, match="0 CUDA GPUs are visible here: use --device cpu"):
        load_model(folder, device="cuda")


@pytest.mark.parametrize("options", [{"device": "abacus"}, {"dtype": "int4"}])
def test_senseless_options(folder, options):
    with pytest.raises(BadRequest, match="use auto"):
        load_model(folder, **options)
