"""One block of a GGUF variant under preset best: both streams through it, every linear solved on its moments.

    both streams -> moments -> the target shifted -> feedback, (descent, refit) x rounds on the types' grids

As `best` does it for GPTQ (refine.py says what the shift is): a tenth of the lanes fits nothing and judges every
step. The types come from the mix, so linears of one group may differ.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from quantmill.architectures import LinearGroup
from quantmill.formats import gguf
from quantmill.quantize.gguf_mix import tensor_types
from quantmill.quantize.gguf_solve import BlockLinear, solve_towards
from quantmill.quantize.gguf_step import BLOCKS, to_bytes
from quantmill.quantize.job import OnEvent
from quantmill.quantize.moments import Goal, Moments
from quantmill.quantize.paired_step import PairedStep
from quantmill.quantize.presets import Recipe
from quantmill.quantize.refine import Shift, choose_target
from quantmill.quantize.shell import Shell
from quantmill.quantize.solver import factorise, refuse_non_finite, relative_loss
from quantmill.quantize.work import SolvedBlock
from quantmill.types import ModuleReport

if TYPE_CHECKING:
    from quantmill.quantize.pipeline import Stream


class GgufBestStep(PairedStep):
    """Solves a block for a GGUF mix on both streams' moments."""

    def __init__(
        self, shell: Shell, block: nn.Module, prefix: str, stream: Stream, index: int, recipe: Recipe
    ) -> None:
        super().__init__(shell, block, prefix, stream, index, recipe)
        self.types = tensor_types(shell.checkpoint.config, stream.variant.container.partition(":")[2])

    def solve(self, on_event: OnEvent) -> SolvedBlock:
        """Solve every group on what the groups before it hand over, and send both streams on."""
        self._solve_groups(on_event, keep=self.pairs.keep)
        return SolvedBlock(self.tensors, tuple(self.reports))

    def _solve_group(self, group: LinearGroup, fit: Moments, judge: Moments | None) -> list[ModuleReport]:
        began, weights = time.perf_counter(), [self.paired.weight(m) for m in group.modules]
        W, rows = torch.cat(weights), [len(w) for w in weights]
        goal = fit.goal(W)
        against = judge.goal(W) if judge else goal
        refuse_non_finite(W, goal.H)
        T, shifts = choose_target(W, rows, goal, against, self.recipe)
        damp = self.recipe.damps[0] if self.recipe.damps else self.stream.variant.config.damp_percent
        factor, fallback = factorise(goal.H, replace(self.stream.variant.config, damp_percent=damp))
        found = []
        for module, target, wanted in zip(
            group.modules, torch.split(T, rows), torch.split(against.R, rows), strict=True
        ):
            judged = Goal(against.H, wanted, against.tokens)
            kind = self.types[self.prefix + module]
            found.append(solve_towards(target, factor, kind, judged.loss, self.recipe.rounds))
            self._keep(module, found[-1][0])
        seconds = (time.perf_counter() - began) / len(weights)
        new = [
            ModuleReport(
                self.prefix + m,
                relative_loss(w, linear.weight, goal.H),
                factor.damp_percent,
                fit.tokens,
                seconds,
                fallback,
                _said(shift, kept),
            )
            for m, w, (linear, kept), shift in zip(group.modules, weights, found, shifts, strict=True)
        ]
        self.reports.extend(new)
        return new

    def _keep(self, module: str, linear: BlockLinear) -> None:
        tap = self.paired.taps[module]
        self.tensors[f"{self.prefix}{module}.{BLOCKS}"] = to_bytes(linear)
        if tap.linear.bias is not None:
            self.tensors[f"{self.prefix}{module}.bias"] = tap.linear.bias.detach().float().cpu()
        tap.use(linear.weight)

    def replay(self, kept: SolvedBlock) -> SolvedBlock:
        """Send both streams through a finished block."""
        device = self.stream.hidden.device
        with self.paired as paired:
            for module, tap in paired.taps.items():
                raw = kept.tensors[f"{self.prefix}{module}.{BLOCKS}"].numpy()
                weight = gguf.dequantize(self.types[self.prefix + module], np.ascontiguousarray(raw))
                tap.use(torch.from_numpy(weight).to(device))
            paired.forward(self.pairs, self.frames, self.pairs.keep)
        return kept


def _said(shift: Shift, kept: int) -> str:
    return f"shift {shift.strength:g} (ridge {shift.ridge:g}), {kept} refinements"
