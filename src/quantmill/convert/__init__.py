"""A quantised folder -> the same model in another container, without loss where that container can hold it.

    gguf:Q4_0  gguf:Q4_1  gguf:Q8_0  gguf       a .gguf file; `gguf` alone takes the type that loses nothing
    awq                                         an AWQ folder, GEMM layout
    gptq  gptq_v2                               a GPTQ folder
    compressed-tensors                          a folder that vLLM reads

Codes, zeros and scales are repacked, never rounded again; what is not bit for bit the same is in the notes.
Knows no solver and no runtime.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from quantmill.checkpoint import open_checkpoint
from quantmill.convert.folders import FOLDERS, write_folder
from quantmill.convert.gguf_file import write_file
from quantmill.errors import BadCheckpoint, BadRequest
from quantmill.types import Json

__all__ = ["TARGETS", "Converted", "convert"]

GGUF_TYPES = ("Q4_0", "Q4_1", "Q8_0")
TARGETS = (*(f"gguf:{t}" for t in GGUF_TYPES), "gguf", *FOLDERS)


@dataclass(frozen=True, slots=True)
class Converted:
    """What was written."""

    path: Path  # the folder, or the .gguf file
    modules: int
    size_bytes: int
    notes: tuple[str, ...]  # what is not bit for bit the same, and why

    def to_json(self) -> Json:
        return {
            "path": str(self.path),
            "modules": self.modules,
            "size_bytes": self.size_bytes,
            "notes": list(self.notes),
        }


def convert(folder: Path, to: str, out: Path, advance: Callable[[int, str], None]) -> Converted:
    """Write the quantised model in `folder` as `to` (a row of TARGETS) to `out`, whole or not at all.

    `out` is a folder; for gguf it may name the file. `advance(1, module)` is called after every linear.
    Raises BadRequest for an unknown target, UnsupportedModel where the container cannot hold the model.
    """
    checkpoint = open_checkpoint(folder)
    modules = checkpoint.quantized_modules()
    if not modules:
        raise BadCheckpoint(
            f"{folder} holds no packed linears: quantise it first (quantmill quantize SOURCE --out DIR)"
        )
    if to in FOLDERS:
        path, notes = write_folder(checkpoint, to, out, advance)
    elif to in TARGETS:
        path, notes = write_file(checkpoint, to.partition(":")[2] or None, out, advance)
    else:
        raise BadRequest(f"there is no container {to!r}: use --to {', '.join(TARGETS)}")
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return Converted(path, len(modules), sum(f.stat().st_size for f in files), notes)
