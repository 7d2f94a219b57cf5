"""Folders for the doctor's tests: sound ones, changed ones, and what was found in them."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from gptq_models import edit_json, write_quantized
from quantmill.doctor import fix
from quantmill.types import CheckpointFormat, CheckReport, Level, QuantConfig
from tiny_models import byte_level_tokenizer, tiny_model

V2 = CheckpointFormat.GPTQ_V2
MODULE = "model.layers.0.self_attn.q_proj"
LOADERS = ("transformers+quantmill", "vllm", "gptqmodel", "exllamav2")
Change = Callable[[dict[str, torch.Tensor]], object]


def make(
    folder: Path, config: QuantConfig, family: str = "qwen2", *, shuffled: bool = False, **settings
) -> Path:
    write_quantized(folder, tiny_model(family, **settings), config, shuffled=shuffled)
    byte_level_tokenizer().save_pretrained(folder)
    return folder


def change(folder: Path, edit: Change) -> None:
    """Let `edit` have every tensor of the weight file."""
    tensors = {k: v.clone() for k, v in load_file(folder / "model.safetensors").items()}
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def label(folder: Path, **keys: object) -> None:
    """Set keys of both configs; None takes a key out."""
    quant = json.loads((folder / "quantize_config.json").read_text()) | keys
    quant = {k: v for k, v in quant.items() if v is not None}
    (folder / "quantize_config.json").write_text(json.dumps(quant))
    edit_json(folder / "config.json", quantization_config=quant)


def found(report: CheckReport, level: Level, words: str) -> list[str]:
    """Where the findings of a level are that hold these words."""
    return [f.where for f in report.findings if f.level is level and words in f.message]


def mended(folder: Path) -> list[str]:
    """The files that were mended."""
    return [note.partition(":")[0] for note in fix(folder).notes]


def errors(report: CheckReport) -> list[str]:
    return [f"{f.where}: {f.message}" for f in report.findings if f.level is Level.ERROR]


def put(suffix: str, value: float, name: str = MODULE) -> Change:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{name}.{suffix}"].view(-1)[0] = value

    return edit


def drop(*names: str) -> Change:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in names:
            del tensors[name]

    return edit
