"""The GPU decoder on AWQ, compressed-tensors and GGUF: the logits of the GPTQ folder they were made from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gptq_models import write_quantized
from quantmill.checkpoint import open_checkpoint
from quantmill.convert import convert
from quantmill.runtime.gpu.decoder import GpuRuntime
from quantmill.runtime.interface import Piece
from quantmill.sources import resolve
from quantmill.types import QuantConfig
from tiny_models import byte_level_tokenizer, tiny_model

IDS = list(range(5, 14))


def logits(folder: Path, device: torch.device) -> torch.Tensor:
    runtime = GpuRuntime.from_folder(folder, device=device, context=64, kv_tokens=128)
    found = runtime.forward([Piece(IDS, 0, (1,), every=True)]).cpu().clone()
    runtime.close()
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    model = tiny_model("llama", num_hidden_layers=1, hidden_size=64, intermediate_size=128)
    write_quantized(folder, model, QuantConfig(4, 32))
    byte_level_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def wanted(source: Path, device: torch.device) -> torch.Tensor:
    return logits(source, device)


@pytest.mark.parametrize("to", ["awq", "compressed-tensors", "gguf"])
def test_the_same_logits(
    source: Path, wanted: torch.Tensor, tmp_path: Path, device: torch.device, to: str
) -> None:
    made = convert(source, to, tmp_path / to, lambda *_: None).path
    other = resolve(str(made), cache_dir=tmp_path, run=True)  # of a .gguf file: its codes' folder
    assert open_checkpoint(other).quantized_modules() == open_checkpoint(source).quantized_modules()
    got = logits(other, device)
    assert float((got - wanted).norm() / wanted.norm()) < 3e-3
