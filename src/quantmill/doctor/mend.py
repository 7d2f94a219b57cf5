"""What `check --fix` changes: the two JSON files, never a weight."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from quantmill.checkpoint import Checkpoint, open_checkpoint, write_json
from quantmill.errors import BadCheckpoint
from quantmill.files import read_json
from quantmill.formats.config import config_to_json
from quantmill.types import CheckpointFormat, Json

LABEL_KEYS = ("checkpoint_format", "format")


def fix(folder: Path) -> tuple[str, ...]:
    """Make config.json and quantize_config.json complete, equal and true to the zeros; returns what changed.

    Raises as open_checkpoint and quant_config do, and BadCheckpoint where modules store zeros in both ways.
    """
    checkpoint = open_checkpoint(folder)
    quant = _true_config(checkpoint)
    wanted = {
        "config.json": checkpoint.config | {"quantization_config": quant},
        "quantize_config.json": quant,
    }
    changed = [name for name, value in wanted.items() if _read(folder / name) != value]
    for name in changed:
        write_json(folder / name, wanted[name])
    return tuple(changed)


def _true_config(checkpoint: Checkpoint) -> Json:
    """The stated keys, the missing ones, and the label that the zeros ask for."""
    config, stated = checkpoint.quant_config, checkpoint.quant or {}
    probed = _probed(checkpoint) or config.zero_format
    kept = {k: v for k, v in stated.items() if v is not None and k not in LABEL_KEYS}
    return config_to_json(replace(config, checkpoint_format=probed)) | kept


def _probed(checkpoint: Checkpoint) -> CheckpointFormat | None:
    found = {checkpoint.packed(m).checkpoint_format for m in checkpoint.quantized_modules()}
    if len(found) > 1:
        raise BadCheckpoint(
            f"{checkpoint.folder} mixes gptq and gptq_v2 zeros; no label is true: quantise again"
        )
    return next(iter(found), None)


def _read(path: Path) -> Json | None:
    return read_json(path) if path.is_file() else None
