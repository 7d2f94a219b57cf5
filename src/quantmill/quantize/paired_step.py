"""What the steps of preset best share: both streams' states, and the way of a block's groups through them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from quantmill.architectures import LinearGroup
from quantmill.quantize.arithmetic import matmul_dtype
from quantmill.quantize.best import held_lanes
from quantmill.quantize.job import ModuleSolved, OnEvent
from quantmill.quantize.moments import Moments
from quantmill.quantize.presets import Recipe
from quantmill.quantize.shell import Shell
from quantmill.quantize.spread import sum_moments
from quantmill.quantize.states import States
from quantmill.quantize.two_streams import Keep, Pair, PairedBlock
from quantmill.types import ModuleReport

if TYPE_CHECKING:
    from quantmill.quantize.pipeline import Stream


class Pairs(Sequence[Pair]):
    """Both streams' hidden states, batch by batch: read when asked for, kept as `States` keeps them."""

    def __init__(self, quantised: States, original: States) -> None:
        self.quantised, self.original = quantised, original

    def __len__(self) -> int:
        return len(self.quantised)

    def __getitem__(self, index: int) -> Pair:  # type: ignore[override]  # no slices
        return Pair(self.quantised[index], self.original[index])

    def keep(self, index: int, pair: Pair) -> None:
        """This batch has gone through the block."""
        self.quantised[index], self.original[index] = pair.quantised, pair.original


def products_dtype(device: torch.device) -> torch.dtype:
    """What the streams are multiplied in: a CPU's sixteen bits gain nothing beside the solving."""
    return matmul_dtype(device) if device.type == "cuda" else torch.float32


class PairedStep:
    """One block of one variant, solved group by group on what both streams say. A container says how."""

    def __init__(
        self, shell: Shell, block: nn.Module, prefix: str, stream: Stream, index: int, recipe: Recipe
    ) -> None:
        assert stream.original is not None, "this recipe compares two streams"
        self.prefix, self.stream, self.recipe = prefix, stream, recipe
        self.frames = [shell.frames_for(shape, index) for shape in stream.hidden.shapes]
        self.pairs = Pairs(stream.hidden, stream.original)
        self.paired = PairedBlock(block, shell.architecture.groups, products_dtype(shell.device))
        self.tensors: dict[str, Tensor] = {}
        self.reports: list[ModuleReport] = []

    def _solve_groups(self, on_event: OnEvent, keep: Keep) -> None:
        """Every group in turn, on what the groups before it hand over; `keep` gets both streams' outputs."""

        def at_group(group: LinearGroup, fit: Moments, judge: Moments | None) -> None:
            fit, judge = sum_moments(fit, judge, self.stream.ranks)
            for report in self._solve_group(group, fit, judge):
                on_event(ModuleSolved(self.stream.variant.branch, report))

        held, waiting = held_lanes(len(self.pairs), self.recipe.heldout), self.stream.residence.waiting
        residual = self.recipe.residual
        with self.paired as paired:
            paired.run(self.pairs, self.frames, held, residual, at_group, keep=keep, waiting=waiting)

    def _solve_group(self, group: LinearGroup, fit: Moments, judge: Moments | None) -> list[ModuleReport]:
        """Solve and keep a group's linears. `judge`: the held-out sums, where any were held out."""
        raise NotImplementedError
