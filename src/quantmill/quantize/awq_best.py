"""One block of an AWQ variant under preset best: both streams through it, scales chosen on held-out tokens.

    both streams -> moments -> the target shifted -> scales tried, each with feedback -> the best kept
    -> (descent, refit) x rounds -> channels refitted -> norms and up_proj rescaled

As `best` does it for GPTQ (refine.py), with one unknown more: with its input channels multiplied by s a linear
has the goal (S^-1 H S^-1, R S^-1) and the target T S, so every step of refine.py serves as it is. Last, with
codes and grids held, the norm's weights that meet the goal best are a least-squares problem of K unknowns.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from greenlet import getcurrent
from torch import Tensor, nn

from quantmill.architectures import LinearGroup
from quantmill.quantize.awq_scales import NORMS, Folding, exact_scales, pivots, refuse_shapes
from quantmill.quantize.job import OnEvent
from quantmill.quantize.kept import packed_tensors, unpacked
from quantmill.quantize.moments import Goal, Moments
from quantmill.quantize.paired_step import PairedStep
from quantmill.quantize.presets import Recipe
from quantmill.quantize.refine import Attempt, choose_target, polish
from quantmill.quantize.shell import Shell
from quantmill.quantize.solver import (
    dequantize,
    factorise,
    refuse_non_finite,
    relative_loss,
    round_to_grid,
    split_rows,
)
from quantmill.quantize.two_streams import Lane
from quantmill.quantize.work import SolvedBlock
from quantmill.types import IntLinear, ModuleReport, QuantConfig

if TYPE_CHECKING:
    from quantmill.quantize.pipeline import Stream

RIDGE = 1e-2  # of the channels' refit, towards what they were, as a share of each unknown's own weight
REACH = 2.0  # a channel moves by no more than this factor


@dataclass(frozen=True, slots=True)
class Tried:
    """A group rounded with its inputs scaled: the codes stand for W s."""

    attempt: Attempt
    scales: Tensor  # s (K,) float32
    said: str  # empty: no scaling


class PairNorm(nn.Module):
    """Stands in for a norm: its own weight for the original's lanes, the folded one for the quantised model's."""

    def __init__(self, norm: nn.Module, folded: Tensor) -> None:
        super().__init__()
        self.original, self.folded = norm, copy.deepcopy(norm)
        self.folded.weight = nn.Parameter(folded, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        lane = getcurrent()
        assert isinstance(lane, Lane), "a norm was called outside of a lane"
        out: Tensor = (self.original if lane.original else self.folded)(x)
        return out


class AwqBestStep(PairedStep):
    """Solves a block with AWQ's scaling on both streams' moments; what it keeps is in GPTQ's layout."""

    def __init__(
        self, shell: Shell, block: nn.Module, prefix: str, stream: Stream, index: int, recipe: Recipe
    ) -> None:
        super().__init__(shell, block, prefix, stream, index, recipe)
        self.block, self.config = block, stream.variant.config
        shapes = {m: tuple(self.paired.weight(m).shape) for m in self.paired.taps}
        refuse_shapes(((prefix + m, (n, k)) for m, (n, k) in shapes.items()), self.config)
        self.folding = Folding(block, prefix, self.tensors)

    def solve(self, on_event: OnEvent) -> SolvedBlock:
        """Solve every group on what the groups before it hand over, then send both streams on."""
        self._solve_groups(on_event, keep=lambda *_: None)
        # Once more with the weights as stored, so that a resumed run ends with the same bytes.
        return self.replay(SolvedBlock(self.tensors, tuple(self.reports)))

    def _solve_group(self, group: LinearGroup, fit: Moments, judge: Moments | None) -> list[ModuleReport]:
        began, weights = time.perf_counter(), [self.paired.weight(m) for m in group.modules]
        W, rows = torch.cat(weights), [len(w) for w in weights]
        goal = fit.goal(W)
        against = judge.goal(W) if judge else goal
        refuse_non_finite(W, goal.H)
        T, _ = choose_target(W, rows, goal, against, self.recipe)
        config = replace(self.config, damp_percent=(*self.recipe.damps, self.config.damp_percent)[0])
        tried = min(
            self._tried(group, weights, T, goal, against, config), key=lambda t: float(t.attempt.loss.sum())
        )
        linear, steps = polish(tried.attempt, rows, scaled(against, tried.scales), config, self.recipe.rounds)
        scales, refitted = self._channels(group, linear, goal, against, tried.scales)
        if tried.said or refitted:
            self.folding.fold(group, scales)
        choice = f"activation-aware, {tried.said or 'no scaling'}{', channels refitted' if refitted else ''}"
        seconds = (time.perf_counter() - began) / len(weights)
        for module, w, part, kept in zip(
            group.modules, weights, split_rows(linear, rows), steps, strict=True
        ):
            self._keep(module, part, scales)
            loss, factor = relative_loss(w, dequantize(part) / scales, goal.H), tried.attempt.factor
            self.reports.append(
                ModuleReport(
                    self.prefix + module,
                    loss,
                    factor.damp_percent,
                    fit.tokens,
                    seconds,
                    tried.attempt.fallback,
                    f"{choice}, {kept} refinements",
                )
            )
        return self.reports[-len(rows) :]

    def _tried(
        self,
        group: LinearGroup,
        weights: Sequence[Tensor],
        T: Tensor,
        goal: Goal,
        against: Goal,
        config: QuantConfig,
    ) -> Iterator[Tried]:
        """One after the other, so that no more than two are held at a time."""
        none = ("", torch.ones(T.shape[1], device=T.device))
        for said, s in (none, *self.folding.candidates(group, weights, pivots(goal.H, config))):
            target, judge = T * s, scaled(against, s)
            factor, fallback = factorise(goal.H / s[:, None] / s, config)
            linear = round_to_grid(target, factor, config)
            loss = judge.loss(dequantize(linear))
            yield Tried(Attempt(linear, target, factor, fallback, "static", loss), s, said)

    def _channels(
        self, group: LinearGroup, linear: IntLinear, goal: Goal, against: Goal, scales: Tensor
    ) -> tuple[Tensor, bool]:
        """The group's scales, refitted where a norm can take them and the judge's loss falls; whether it did."""
        if group.name not in NORMS:
            return scales, False
        Q = dequantize(linear)
        moved = exact_scales(self.folding.norm(group), refit_channels(Q, goal, scales))
        before, after = (float(against.loss(Q / s).sum()) for s in (scales, moved))
        return (moved, True) if after < before else (scales, False)

    def _keep(self, module: str, linear: IntLinear, scales: Tensor) -> None:
        tap = self.paired.taps[module]
        self.tensors |= packed_tensors(self.prefix + module, linear, self.config, tap.linear.bias)
        tap.use(dequantize(linear) / scales)

    def replay(self, kept: SolvedBlock) -> SolvedBlock:
        """Send both streams through a finished block: the original's norms for one, the kept ones for the other."""
        device = self.stream.hidden.device
        with self._folded_norms(kept), self.paired as paired:
            for module, tap in paired.taps.items():
                tap.use(dequantize(unpacked(kept.tensors, self.prefix + module, self.config, device)))
            paired.forward(self.pairs, self.frames, self.pairs.keep)
        return kept

    @contextmanager
    def _folded_norms(self, kept: SolvedBlock) -> Iterator[None]:
        device = self.stream.hidden.device
        before = {
            n: self.block.get_submodule(n)
            for n in NORMS.values()
            if f"{self.prefix}{n}.weight" in kept.tensors
        }
        for name, norm in before.items():
            weight = kept.tensors[f"{self.prefix}{name}.weight"].float().to(device)
            setattr(self.block, name, PairNorm(norm, weight))
        try:
            yield
        finally:
            for name, norm in before.items():  # other variants solve the same block
                setattr(self.block, name, norm)


def scaled(goal: Goal, s: Tensor) -> Goal:
    """The goal of W s, whose inputs are divided by s (K,): the same loss for Q s as `goal` has for Q."""
    return Goal(goal.H / s[:, None] / s, goal.R / s, goal.tokens)


def refit_channels(Q: Tensor, goal: Goal, scales: Tensor) -> Tensor:
    """Scales s (K,) float32 for which Q / s (N, K) meets the goal best, the codes' own Q held.

    With v = 1 / s: loss = v^T (Q^T Q * H) v - 2 v^T diag(R^T Q), normal equations of K unknowns, in float64, with
    a ridge towards the scales there are. Those without a Cholesky factor leave the scales as they are.
    """
    wide = Q.double()
    M = (wide.T @ wide).mul_(goal.H.double())
    r = (wide * goal.R.double()).sum(0)
    pull = RIDGE * M.diagonal() + 1e-12 * M.diagonal().mean() + 1e-30
    old = 1 / scales.double()
    M.diagonal().add_(pull)
    L, info = torch.linalg.cholesky_ex(M)
    if int(info):
        return scales
    new = torch.cholesky_solve((r + pull * old)[:, None], L)[:, 0]
    return (1 / torch.minimum(torch.maximum(new, old / REACH), old * REACH)).float()
