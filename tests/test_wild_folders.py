"""GPTQ folders as other tools leave them, each built here from its documented layout, each read right.

Truth is what the codes stand for, worked out without any packing (gptq_models.exact_weight); read by the
checkpoint, and run: through Transformers, and by the runtime of the command line, which give the same logits.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gptq_models import exact_weight, round_to_nearest
from quantmill.checkpoint import modern_view, open_checkpoint
from quantmill.formats.gptq import dequantize, pack
from quantmill.runtime.load import load_model
from quantmill.runtime.opening import open_runtime
from quantmill.runtime.single import SingleSequence
from quantmill.types import ActOrder, CheckpointFormat, QuantConfig
from tiny_models import tiny_model

V1, V2 = CheckpointFormat.GPTQ, CheckpointFormat.GPTQ_V2
IDS = torch.randint(0, 320, (2, 20), generator=torch.Generator().manual_seed(2))
COMMON = QuantConfig(4, 32)
SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")


class Wild:
    """A folder under construction: a tiny model whose linears are quantised one by one."""

    def __init__(self, folder: Path, family: str = "llama", **settings) -> None:
        self.folder, self.model = folder, tiny_model(family, **settings)
        self.tensors = {k: v.half().clone() for k, v in self.model.state_dict().items()}
        self.truth: dict[str, torch.Tensor] = {}

    def quantise(
        self, config: QuantConfig, *, only: str = "", head: bool = False, shuffled: bool = False
    ) -> None:
        """Every linear whose name holds `only`; zeros stored as config.zero_format says."""
        for name, module in self.model.named_modules():
            wanted = isinstance(module, nn.Linear) and only in name and (head or name != "lm_head")
            if not wanted or name in self.truth:
                continue
            linear = round_to_nearest(module.weight.data, config, shuffled=shuffled)
            bias = None if module.bias is None else module.bias.data
            packed = pack(linear, config, bias)
            self.truth[name] = exact_weight(linear)
            module.weight.data = self.truth[name].float()
            del self.tensors[f"{name}.weight"]
            for suffix in SUFFIXES:
                self.tensors[f"{name}.{suffix}"] = getattr(packed, suffix)

    def write(
        self, quant: dict, *, file: str = "model.safetensors", beside: bool = False, shards: int = 1
    ) -> Path:
        """`beside`: quantize_config.json only, as in the days of AutoGPTQ."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.model.config.architectures = [type(self.model).__name__]
        self.model.config.save_pretrained(self.folder)
        config = json.loads((self.folder / "config.json").read_text()) | {"dtype": "float16"}
        if beside:
            (self.folder / "quantize_config.json").write_text(json.dumps(quant))
        else:
            config["quantization_config"] = quant
        (self.folder / "config.json").write_text(json.dumps(config))
        tensors = {k: v.contiguous() for k, v in self.tensors.items()}
        if shards == 1:
            save_file(tensors, self.folder / file, metadata={"format": "pt"})
            return self.folder
        names = sorted(tensors)
        index: dict[str, str] = {}
        for i in range(shards):
            shard = f"model-{i + 1:05}-of-{shards:05}.safetensors"
            part = {n: tensors[n] for n in names[i::shards]}
            save_file(part, self.folder / shard, metadata={"format": "pt"})
            index |= dict.fromkeys(part, shard)
        (self.folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": index})
        )
        return self.folder

    def check(self, tmp_path: Path) -> None:
        opened = open_checkpoint(self.folder)
        assert set(opened.quantized_modules()) == set(self.truth)
        for name, weight in self.truth.items():
            assert torch.equal(dequantize(opened.packed(name), torch.float64), weight), name
        model = load_model(self.folder, device="cpu", cache=tmp_path / "cache")
        with torch.inference_mode():
            got, wanted = model(IDS).logits, self.model(IDS).logits
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)
        runtime = open_runtime(self.folder, device="cpu", threads=1, exact=True, kv_tokens=64)
        try:
            fast = torch.as_tensor(SingleSequence(runtime).score(IDS[0].tolist()))
        finally:
            runtime.close()
        torch.testing.assert_close(fast, wanted[0], rtol=2e-3, atol=2e-3)


AUTOGPTQ = {
    "bits": 4,
    "group_size": 32,
    "damp_percent": 0.1,
    "desc_act": False,
    "sym": True,
    "true_sequential": True,
    "model_name_or_path": None,
    "model_file_base_name": "gptq_model-4bit-32g",
}


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("named", ["gptq_model-4bit-32g.safetensors", "model.safetensors"])
def test_autogptq_of_2023(tmp_path: Path, act_order: bool, named: str) -> None:
    """Only quantize_config.json, a weight file with a name of its own, a real g_idx with act order."""
    wild = Wild(tmp_path / "model")
    order = ActOrder.GROUPED if act_order else ActOrder.NONE
    wild.quantise(QuantConfig(4, 32, order), shuffled=act_order)
    wild.write(AUTOGPTQ | {"desc_act": act_order}, file=named, beside=True)
    wild.check(tmp_path)


def test_autogptq_without_g_idx(tmp_path: Path) -> None:
    """GPTQ-for-LLaMa's successors before 0.2 wrote none where groups are consecutive."""
    wild = Wild(tmp_path / "model")
    wild.quantise(COMMON)
    wild.tensors = {k: v for k, v in wild.tensors.items() if not k.endswith("g_idx")}
    wild.write(AUTOGPTQ, file="gptq_model-4bit-32g.safetensors", beside=True)
    wild.check(tmp_path)


def test_gptqmodel_7(tmp_path: Path) -> None:
    """Both configs, method and format twice, the solver's parameters in meta, v2."""
    wild = Wild(tmp_path / "model", "qwen2")
    wild.quantise(QuantConfig(4, 32, ActOrder.NONE, checkpoint_format=V2))
    quant = {
        "bits": 4,
        "group_size": 32,
        "desc_act": False,
        "lm_head": False,
        "method": "gptq",
        "quant_method": "gptq",
        "format": "gptq_v2",
        "checkpoint_format": "gptq_v2",
        "pack_dtype": "int32",
        "sym": True,
        "meta": {"quantizer": ["gptqmodel:7.7.0"], "damp_percent": 0.05, "act_group_aware": True},
    }
    (wild.write(quant) / "quantize_config.json").write_text(json.dumps(quant))
    wild.check(tmp_path)


@pytest.mark.parametrize("stored", [V1, V2])
@pytest.mark.parametrize("label", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zeros_are_what_they_are_whatever_the_label_says(
    tmp_path: Path, stored, label: str, bits: int
) -> None:
    """Optimum writes v2 zeros under the label gptq; the reverse exists, too."""
    wild = Wild(tmp_path / "model")
    wild.quantise(QuantConfig(bits, 32, ActOrder.NONE, checkpoint_format=stored))
    keys = {"quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": False, "sym": True}
    wild.write(keys | {"checkpoint_format": label})
    wild.check(tmp_path)


@pytest.mark.parametrize("label", [V1, V2])
def test_asymmetric_zeros_follow_the_label(tmp_path: Path, label: CheckpointFormat) -> None:
    wild = Wild(tmp_path / "model")
    config = QuantConfig(4, 32, ActOrder.NONE, sym=False, checkpoint_format=label)
    wild.quantise(config)
    keys = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
    wild.write(keys | {"checkpoint_format": str(label)})
    wild.check(tmp_path)


def test_optimum_of_transformers_writes_these_keys(tmp_path: Path) -> None:
    from transformers.utils.quantization_config import GPTQConfig

    wild = Wild(tmp_path / "model")
    wild.quantise(QuantConfig(4, 32, ActOrder.NONE, checkpoint_format=V2))
    quant = GPTQConfig(bits=4, group_size=32, desc_act=False, sym=True).to_dict()
    quant["modules_in_block_to_quantize"] = None
    wild.write({k: (str(v.value) if hasattr(v, "value") else v) for k, v in quant.items()})
    wild.check(tmp_path)


def test_some_modules_of_a_block(tmp_path: Path) -> None:
    """modules_in_block_to_quantize: what is not named keeps its weight."""
    wild = Wild(tmp_path / "model")
    wild.quantise(COMMON, only="self_attn")
    keys = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
    names = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"]]
    wild.write(keys | {"modules_in_block_to_quantize": names})
    wild.check(tmp_path)
    assert len(wild.truth) == 8


def test_a_quantised_head(tmp_path: Path) -> None:
    wild = Wild(tmp_path / "model")
    wild.quantise(COMMON, head=True)
    keys = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
    wild.write(keys | {"lm_head": True})
    wild.check(tmp_path)
    assert "lm_head" in wild.truth


def test_dynamic_parameters_of_gptqmodel(tmp_path: Path) -> None:
    """Bits and groups by regular expression, the first that matches; "-:" leaves a module alone."""
    wild = Wild(tmp_path / "model")
    wild.quantise(QuantConfig(8, 16), only="layers.1.mlp.down_proj")
    wild.quantise(QuantConfig(8, 64), only="down_proj")
    wild.quantise(QuantConfig(2, 32), only="gate_proj")
    for only in ("q_proj", "v_proj", "o_proj", "up_proj"):
        wild.quantise(COMMON, only=only)
    keys = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
    rules = {
        r"-:.*k_proj": {},
        r"+:.*\.1\.mlp\.down_proj": {"bits": 8, "group_size": 16},
        r".*down_proj": {"bits": 8, "group_size": 64},
        r".*gate_proj": {"bits": 2},
    }
    wild.write(keys | {"dynamic": rules})
    wild.check(tmp_path)


@pytest.mark.parametrize("packing", ["auto_round:auto_gptq", "auto_round:gptq"])
def test_autoround_in_its_own_name(tmp_path: Path, packing: str) -> None:
    """quant_method auto-round, tensors as GPTQ v1, exceptions by full name in extra_config."""
    wild = Wild(tmp_path / "model")
    wild.quantise(QuantConfig(8, 32), only="layers.0.self_attn.v_proj")
    wild.quantise(COMMON)
    quant = {
        "quant_method": "auto-round",
        "packing_format": packing,
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "data_type": "int",
        "iters": 200,
        "autoround_version": "0.14.0",
        "extra_config": {"model.layers.0.self_attn.v_proj": {"bits": 8, "group_size": 32}},
    }
    wild.write(quant)
    wild.check(tmp_path)
    seen = json.loads((modern_view(wild.folder, tmp_path / "cache") / "config.json").read_text())
    assert seen["quantization_config"]["quant_method"] == "gptq"


def test_autoround_exported_as_gptq(tmp_path: Path) -> None:
    wild = Wild(tmp_path / "model")
    wild.quantise(COMMON)
    keys = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
    wild.write(keys | {"autoround_version": "0.14.0", "damp_percent": 0.01, "true_sequential": False})
    wild.check(tmp_path)


@pytest.mark.parametrize("family", ["qwen2", "mistral"])
def test_shards_and_biases(tmp_path: Path, family: str) -> None:
    wild = Wild(tmp_path / "model", family)
    wild.quantise(COMMON)
    keys = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
    wild.write(keys, shards=3)
    wild.check(tmp_path)


def test_scales_in_other_floats(tmp_path: Path) -> None:
    """bfloat16 and float32 scales exist; what float16 holds of them is read without loss."""
    wild = Wild(tmp_path / "model")
    wild.quantise(COMMON)
    for number, name in enumerate(n for n in list(wild.tensors) if n.endswith(".scales")):
        wild.tensors[name] = wild.tensors[name].float() if number % 2 else wild.tensors[name]
    keys = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
    wild.write(keys)
    wild.check(tmp_path)
