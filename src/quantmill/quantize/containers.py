"""What a variant is written as: one row per container, with what solves its blocks and what writes them.

gptq            a GPTQ folder (the preset decides what solves)
gguf:MIX        a .gguf file in the variant's folder
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from quantmill.checkpoint import Checkpoint
from quantmill.errors import BadRequest
from quantmill.quantize.block_step import BlockStep
from quantmill.quantize.folder import REPORT, write_variant
from quantmill.quantize.gguf_mix import mix_name
from quantmill.quantize.gguf_out import write_gguf_variant
from quantmill.quantize.gguf_step import GgufStep
from quantmill.quantize.job import Finished, Job
from quantmill.types import Json, Variant

Writer = Callable[[Job, Variant, Checkpoint, Iterable[tuple[str, Tensor]], Json], Finished]


@dataclass(frozen=True, slots=True)
class Container:
    """One row."""

    step: type[BlockStep] | None  # None: the preset's
    write: Writer


CONTAINERS = {
    "gptq": Container(None, write_variant),
    "gguf": Container(GgufStep, write_gguf_variant),
}


def container_of(variant: Variant) -> Container:
    """The row for a variant. Raises BadRequest, naming the rows there are."""
    name = variant.container.partition(":")[0]
    if name not in CONTAINERS:
        raise BadRequest(f"there is no container {variant.container!r}: use {', '.join(CONTAINERS)}")
    return CONTAINERS[name]


def check_container(name: str) -> str:
    """`name` in its own spelling: gguf:Q4_K -> gguf:Q4_K_M. Raises UserError for what is not written."""
    kind, _, mix = name.partition(":")
    if kind == "gguf":
        return f"gguf:{mix_name(mix)}"
    return name


def finished_in(folder: Path) -> bool:
    """Whether a folder is a complete variant."""
    return (folder / REPORT).is_file()
