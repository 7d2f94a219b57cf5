"""One block of an AWQ variant: input channels scaled before rounding, the scales folded into what comes before.

    lanes -> Hessian -> scales tried, each with the full solver -> the best kept -> norms and up_proj rescaled

The scales are AWQ's (awq_scales.py). Rounding is the solver's, with error feedback, so no scaling is among the
candidates and the result is never worse than plain GPTQ on the calibration tokens.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from quantmill.architectures import LinearGroup
from quantmill.quantize.awq_scales import NORMS, Candidate, Folding, pivots, refuse_shapes
from quantmill.quantize.block_step import BlockStep
from quantmill.quantize.hessian import Hessian
from quantmill.quantize.job import OnEvent
from quantmill.quantize.kept import packed_tensors
from quantmill.quantize.solver import Solution, dequantize, relative_loss, solve_group
from quantmill.quantize.work import SolvedBlock
from quantmill.types import ModuleReport, QuantConfig

if TYPE_CHECKING:
    from quantmill.quantize.pipeline import Stream
    from quantmill.quantize.shell import Shell


@dataclasses.dataclass(frozen=True, slots=True)
class Scaled:
    """A group solved with its inputs scaled: W s is what the codes stand for."""

    solutions: list[Solution]
    scales: Tensor | None  # s (K,) float32
    said: str  # empty: no scaling
    loss: float  # the group's, on the calibration tokens


class AwqStep(BlockStep):
    """Solves a block with AWQ's scaling; everything it keeps is as the file will hold it, in GPTQ's layout."""

    def __init__(self, shell: Shell, block: nn.Module, prefix: str, stream: Stream, index: int) -> None:
        super().__init__(shell, block, prefix, stream, index)
        shapes = {m: tuple(self.tapped.weight(m).shape) for m in self.tapped.taps}
        refuse_shapes(((prefix + m, (n, k)) for m, (n, k) in shapes.items()), self.config)
        self.folding = Folding(block, prefix, self.tensors)

    def solve(self, on_event: OnEvent) -> SolvedBlock:
        hidden, waiting = self.stream.hidden, self.stream.residence.waiting
        with self.tapped as tapped:
            at_group = self._at_group(on_event)
            tapped.run(hidden, self.frames, at_group, keep=lambda *_: None, waiting=waiting)
        # Once more with the weights as stored, so that a resumed run ends with the same bytes.
        return self.replay(SolvedBlock(self.tensors, tuple(self.reports)))

    def _solve_group(self, group: LinearGroup, hessian: Hessian) -> list[ModuleReport]:
        began, tokens = time.perf_counter(), hessian.tokens
        H = hessian.mean()
        weights = [self.tapped.weight(m) for m in group.modules]
        candidates = self.folding.candidates(group, weights, pivots(H, self.config))
        best = solve_scaled(weights, H, candidates, self.config)
        if best.scales is not None:
            self.folding.fold(group, best.scales)
        for module, solution in zip(group.modules, best.solutions, strict=True):
            tap = self.tapped.taps[module]
            name, bias = self.prefix + module, tap.original.bias
            self.tensors |= packed_tensors(name, solution.linear, self.config, bias)
            stored = dequantize(solution.linear)
            tap.use(stored if best.scales is None else stored / best.scales)
        seconds = (time.perf_counter() - began) / len(weights)
        choice = f"activation-aware, {best.said or 'no scaling'}"
        new = [
            ModuleReport(self.prefix + m, s.loss, s.damp_percent, tokens, seconds, s.fallback, choice)
            for m, s in zip(group.modules, best.solutions, strict=True)
        ]
        self.reports.extend(new)
        return new

    def replay(self, kept: SolvedBlock) -> SolvedBlock:
        hidden, device = self.stream.hidden, self.stream.hidden.device
        norms = [n for n in NORMS.values() if f"{self.prefix}{n}.weight" in kept.tensors]
        weights = {n: self.tapped.block.get_parameter(f"{n}.weight") for n in norms}
        before = {n: weight.data for n, weight in weights.items()}
        with self.tapped as tapped:
            for name in norms:
                weights[name].data = kept.tensors[f"{self.prefix}{name}.weight"].float().to(device)
            for module, tap in tapped.taps.items():
                tap.use(dequantize(self._kept(kept, module)))
            tapped.forward(hidden, self.frames, hidden.__setitem__)
        for name, weight in before.items():  # other variants solve the same block
            weights[name].data = weight
        return kept


def solve_scaled(
    weights: Sequence[Tensor], H: Tensor, candidates: Sequence[Candidate], config: QuantConfig
) -> Scaled:
    """Solve a group once for every candidate and without scaling; the least error of the outputs wins."""
    tried = [_solved(weights, H, None, "", config)]
    for said, scales in candidates:
        tried.append(_solved(weights, H, scales, said, config))
    return min(tried, key=lambda t: t.loss)


def _solved(
    weights: Sequence[Tensor], H: Tensor, scales: Tensor | None, said: str, config: QuantConfig
) -> Scaled:
    s = torch.ones(len(H), device=H.device) if scales is None else scales
    solutions = solve_group([w * s for w in weights], H / s[:, None] / s, config)
    losses = [relative_loss(w, dequantize(n.linear) / s, H) for w, n in zip(weights, solutions, strict=True)]
    whole = [float(((w @ H) * w).sum()) for w in weights]
    mine = [dataclasses.replace(n, loss=loss) for n, loss in zip(solutions, losses, strict=True)]
    total = sum(part * loss for part, loss in zip(whole, losses, strict=True))
    return Scaled(mine, scales, said, total)
