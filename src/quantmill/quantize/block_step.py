"""One block of one variant in one stream: every group solved on what the quantised groups before it hand over.

lanes -> Hessian -> solve -> pack -> the lanes go on with the dequantised weights
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from torch import Tensor, nn

from quantmill.architectures import LinearGroup
from quantmill.errors import BadCheckpoint
from quantmill.quantize.arithmetic import matmul_dtype
from quantmill.quantize.hessian import Hessian
from quantmill.quantize.job import ModuleSolved, OnEvent
from quantmill.quantize.kept import packed_tensors, unpacked
from quantmill.quantize.lanes import AtGroup, TappedBlock
from quantmill.quantize.shell import Shell
from quantmill.quantize.solver import dequantize
from quantmill.quantize.spread import solve_spread, sum_hessian
from quantmill.quantize.work import SolvedBlock
from quantmill.types import IntLinear, ModuleReport, QuantConfig

if TYPE_CHECKING:
    from quantmill.quantize.pipeline import Stream


class BlockStep:
    """One block of one variant: either solved now, or sent through with the weights an earlier run kept."""

    def __init__(self, shell: Shell, block: nn.Module, prefix: str, stream: Stream, index: int) -> None:
        self.stream, self.prefix, self.config = stream, prefix, stream.variant.config
        self.frames = [shell.frames_for(shape, index) for shape in stream.hidden.shapes]
        self.tapped = TappedBlock(block, shell.architecture.groups, matmul_dtype(shell.device))
        self.tensors: dict[str, Tensor] = {}
        self.reports: list[ModuleReport] = []

    def solve(self, on_event: OnEvent) -> SolvedBlock:
        """Solve every group on what the groups before it hand over: quantised ones, if true-sequential."""
        at_group = self._at_group(on_event)
        hidden, waiting = self.stream.hidden, self.stream.residence.waiting
        with self.tapped as tapped:
            if self.config.true_sequential:
                keep = hidden.__setitem__
                tapped.run(hidden, self.frames, at_group, keep=keep, waiting=waiting)
            else:
                hessians: list[tuple[LinearGroup, Hessian]] = []
                arrived = lambda group, hessian: hessians.append((group, hessian))  # noqa: E731
                tapped.run(hidden, self.frames, arrived, keep=lambda *_: None, waiting=waiting)
                for group, hessian in hessians:
                    at_group(group, hessian)
                tapped.forward(hidden, self.frames, hidden.__setitem__)
        return SolvedBlock(self.tensors, tuple(self.reports))

    def _at_group(self, on_event: OnEvent) -> AtGroup:
        """What is done when a group's inputs have all been seen."""

        def solve(group: LinearGroup, hessian: Hessian) -> None:
            sum_hessian(hessian, self.stream.ranks)
            for report in self._solve_group(group, hessian):
                on_event(ModuleSolved(self.stream.variant.branch, report))

        return solve

    def _solve_group(self, group: LinearGroup, hessian: Hessian) -> list[ModuleReport]:
        began, ranks = time.perf_counter(), self.stream.ranks
        weights = [self.tapped.weight(m) for m in group.modules]
        try:
            config = self._config_of(group.modules[0])  # a group's linears share a setting
            solutions = solve_spread(weights, hessian.mean(), config, ranks)
        except BadCheckpoint as e:
            raise BadCheckpoint(f"{self.prefix}{group.modules[0]}: {e}") from e
        for module, solution in zip(group.modules, solutions, strict=True):
            tap = self.tapped.taps[module]
            tap.use(dequantize(solution.linear))
            if ranks.first:
                name, bias = self.prefix + module, tap.original.bias
                self.tensors |= packed_tensors(name, solution.linear, config, bias)
        seconds = (time.perf_counter() - began) / len(solutions)
        new = [
            ModuleReport(self.prefix + m, s.loss, s.damp_percent, hessian.tokens, seconds, s.fallback)
            for m, s in zip(group.modules, solutions, strict=True)
        ]
        self.reports.extend(new)
        return new

    def replay(self, kept: SolvedBlock) -> SolvedBlock:
        """Send the hidden states through the packed weights of a finished block."""
        hidden = self.stream.hidden
        with self.tapped as tapped:
            for module, tap in tapped.taps.items():
                tap.use(dequantize(self._kept(kept, module)))
            tapped.forward(hidden, self.frames, hidden.__setitem__)
        return kept

    def _kept(self, kept: SolvedBlock, module: str) -> IntLinear:
        """A linear of a finished block, on the device."""
        device = self.stream.hidden.device
        return unpacked(kept.tensors, self.prefix + module, self._config_of(module), device)

    def _config_of(self, module: str) -> QuantConfig:
        return self.stream.variant.config_of(self.prefix + module)
