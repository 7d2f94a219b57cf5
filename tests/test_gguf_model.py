"""A GGUF file run from its own codes: the values are the file's, whichever types are mixed in it."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from quantmill.checkpoint import open_checkpoint
from quantmill.formats.gguf import TYPES, dequantize
from quantmill.formats.gptq import dequantize as dequantize_packed
from quantmill.gguf_model import runs_packed
from quantmill.gguf_target import GgufModel, GgufTensor, write_gguf
from quantmill.runtime.load import load_model
from quantmill.sources import resolve
from tiny_models import byte_level_tokenizer, tiny_model

IDS = torch.randint(0, 320, (2, 20), generator=torch.Generator().manual_seed(2))


def quantised(weight: torch.Tensor, name: str) -> np.ndarray:
    return gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[name])


def write(folder: Path, family: str, kinds: dict[str, str]) -> tuple[Path, dict[str, torch.Tensor]]:
    """A GGUF file whose linears have the type that `kinds` names by suffix, and what it stands for."""
    model = tiny_model(family)
    model.save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    values, tensors = {}, []
    for name, tensor in model.state_dict().items():
        kind = next((k for suffix, k in kinds.items() if name.endswith(f"{suffix}.weight")), None)
        kind = kind or ("F16" if tensor.ndim > 1 else "F32")
        if kind in TYPES:
            rows = quantised(tensor, kind)
            values[name] = torch.from_numpy(dequantize(TYPES[kind], rows))
        else:
            rows = tensor.numpy().astype(np.float16 if kind == "F16" else np.float32)
            values[name] = tensor
        tensors.append(GgufTensor(name, tuple(tensor.shape), kind, lambda rows=rows: rows))
    config = json.loads((folder / "config.json").read_text())
    write_gguf(folder / "m.gguf", GgufModel("m", config, folder, "Q4_0"), tensors)
    return folder / "m.gguf", values


MIXED = {"q_proj": "Q4_0", "k_proj": "Q5_0", "v_proj": "Q8_0", "up_proj": "Q4_1", "down_proj": "Q4_0"}


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_codes_are_kept_and_the_rest_is_dequantised(tmp_path: Path, family: str) -> None:
    path, values = write(tmp_path / "model", family, MIXED)
    assert runs_packed(path)
    folder = resolve(str(path), cache_dir=tmp_path / "cache", run=True)
    opened = open_checkpoint(folder)
    packed = {m: opened.packed(m) for m in opened.quantized_modules()}
    assert {m.rpartition(".")[2]: p.bits for m, p in packed.items()} == {
        "q_proj": 4,
        "k_proj": 8,
        "v_proj": 8,
        "down_proj": 4,
    }
    for module, linear in packed.items():
        assert torch.equal(dequantize_packed(linear, torch.float32), values[f"{module}.weight"])
    up = opened.load("model.layers.0.mlp.up_proj.weight")
    assert torch.equal(up, values["model.layers.0.mlp.up_proj.weight"].half())


def test_the_model_is_the_files(tmp_path: Path) -> None:
    path, values = write(tmp_path / "model", "mistral", MIXED)
    twin = tiny_model("mistral")
    twin.load_state_dict(values)
    folder = resolve(str(path), cache_dir=tmp_path / "cache", run=True)
    with torch.inference_mode():
        got, wanted = load_model(folder, device="cpu")(IDS).logits, twin(IDS).logits
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


def test_a_file_without_such_types_becomes_fp16(tmp_path: Path) -> None:
    path, _ = write(tmp_path / "model", "mistral", {"proj": "Q5_1"})
    assert not runs_packed(path)
    folder = resolve(str(path), cache_dir=tmp_path / "cache", run=True)
    assert open_checkpoint(folder).quantized_modules() == ()
    assert folder == resolve(str(path), cache_dir=tmp_path / "cache")


def test_source_and_model_of_one_file_are_two_folders(tmp_path: Path) -> None:
    path, _ = write(tmp_path / "model", "mistral", {"proj": "Q4_0"})
    ran = resolve(str(path), cache_dir=tmp_path / "cache", run=True)
    source = resolve(str(path), cache_dir=tmp_path / "cache")
    assert len(open_checkpoint(ran).quantized_modules()) == 14
    assert open_checkpoint(source).quantized_modules() == ()
    assert (ran / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
