"""What a variant is written as: one row per container, with what solves its blocks and what writes them.

gptq            a GPTQ folder (the preset decides what solves)
gguf:MIX        a .gguf file in the variant's folder
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from quantmill.checkpoint import Checkpoint
from quantmill.errors import BadRequest
from quantmill.quantize.awq_best import AwqBestStep
from quantmill.quantize.awq_out import write_awq_variant
from quantmill.quantize.awq_step import AwqStep
from quantmill.quantize.block_step import BlockStep
from quantmill.quantize.folder import write_variant
from quantmill.quantize.gguf_best import GgufBestStep
from quantmill.quantize.gguf_mix import gguf_bytes
from quantmill.quantize.gguf_out import write_gguf_variant
from quantmill.quantize.gguf_step import GgufStep
from quantmill.quantize.job import Finished, Job
from quantmill.quantize.plan import size_bytes
from quantmill.quantize.presets import recipe_of
from quantmill.types import Json, Variant

Writer = Callable[[Job, Variant, Checkpoint, Iterable[tuple[str, Tensor]], Json], Finished]


@dataclass(frozen=True, slots=True)
class Container:
    """One row."""

    step: type[BlockStep] | None  # None: the preset's
    write: Writer
    best: type[GgufBestStep | AwqBestStep] | None = None  # under a preset of two streams, where that differs


CONTAINERS = {
    "gptq": Container(None, write_variant),
    "awq": Container(AwqStep, write_awq_variant, AwqBestStep),
    "gguf": Container(GgufStep, write_gguf_variant, GgufBestStep),
}


def container_of(variant: Variant) -> Container:
    """The row for a variant. Raises BadRequest, naming the rows there are."""
    name = variant.container.partition(":")[0]
    if name not in CONTAINERS:
        raise BadRequest(f"there is no container {variant.container!r}: use {', '.join(CONTAINERS)}")
    return CONTAINERS[name]


def compares_streams(variant: Variant, preset: str) -> bool:
    """Whether the variant's blocks are solved on the original's activations beside the quantised model's."""
    row = container_of(variant)
    return (row.step is None or row.best is not None) and recipe_of(preset, variant).two_streams


def refuse_untrained(variants: Sequence[Variant]) -> None:
    """Raise BadRequest where a variant's container has nothing that training could move."""
    for variant in variants:
        if variant.container != "gptq":
            raise BadRequest(
                f"{variant.branch}: --tune-blocks and --distill train GPTQ folders, not {variant.container}: "
                "leave them out"
            )


def planned_bytes(config: Json, variant: Variant) -> int:
    """Bytes of a variant's weight files, from config.json alone."""
    kind, _, mix = variant.container.partition(":")
    return gguf_bytes(config, mix) if kind == "gguf" else size_bytes(config, variant.config)
