"""One block under preset best: two streams through it, every group solved on its moments. Knows no files."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quantmill.architectures import LinearGroup
from quantmill.errors import BadCheckpoint
from quantmill.quantize.moments import Moments
from quantmill.quantize.presets import Recipe, module_recipe
from quantmill.quantize.ranks import Ranks
from quantmill.quantize.solver import Solution, dequantize
from quantmill.quantize.spread import solve_best_spread, sum_moments
from quantmill.quantize.two_streams import Keep, Pair, PairedBlock
from quantmill.types import IntLinear, ModuleReport, QuantConfig

OnReport = Callable[[ModuleReport], None]
ALONE = Ranks()


@dataclass(frozen=True, slots=True)
class SolvedPair:
    """What a block's solving leaves: the codes, the reports, both streams' outputs."""

    linears: dict[str, IntLinear]  # by module name within the block
    reports: tuple[ModuleReport, ...]
    pairs: list[Pair]


def held_lanes(lanes: int, share: float) -> int:
    """How many of the lanes are kept for judging: none where there are too few."""
    return 0 if lanes < 2 or share <= 0 else max(1, round(lanes * share))


def solve_block(
    block: nn.Module,
    groups: Sequence[LinearGroup],
    pairs: Sequence[Pair],
    frames: Sequence[Mapping[str, Any]],
    config_of: Callable[[str], QuantConfig],
    recipe: Recipe,
    on_report: OnReport,
    prefix: str = "",
    matmul_dtype: torch.dtype = torch.float32,
    *,
    keep: Keep | None = None,
    waiting: bool = True,
    ranks: Ranks = ALONE,
) -> SolvedPair:
    """Solve every group of a block on what the groups before it hand over; a pure function of tensors.

    `keep` and `waiting` as `PairedBlock.run` has them: with `keep`, the result holds no outputs. ranks: those
    that have the other pairs of the same block; every one gets all linears.
    """
    linears: dict[str, IntLinear] = {}
    reports: list[ModuleReport] = []
    held = held_lanes(len(pairs), recipe.heldout)
    with PairedBlock(block, groups, matmul_dtype) as paired:

        def at_group(group: LinearGroup, fit: Moments, judge: Moments | None) -> None:
            began = time.perf_counter()
            fit, judge = sum_moments(fit, judge, ranks)
            config = config_of(group.modules[0])
            solutions = _solve_group(paired, group, fit, judge, config, recipe, prefix, ranks)
            seconds = (time.perf_counter() - began) / len(solutions)
            for module, s in zip(group.modules, solutions, strict=True):
                linears[module] = s.linear
                paired.taps[module].use(dequantize(s.linear))
                reports.append(_report(prefix + module, s, fit.tokens, seconds))
                on_report(reports[-1])

        after = paired.run(pairs, frames, held, recipe.residual, at_group, keep=keep, waiting=waiting)
    return SolvedPair(linears, tuple(reports), after)


def _solve_group(
    paired: PairedBlock,
    group: LinearGroup,
    fit: Moments,
    judge: Moments | None,
    config: QuantConfig,
    recipe: Recipe,
    prefix: str,
    ranks: Ranks,
) -> list[Solution]:
    weights = [paired.weight(m) for m in group.modules]
    try:
        return solve_best_spread(weights, fit, judge, config, module_recipe(recipe, config), ranks)
    except BadCheckpoint as e:
        raise BadCheckpoint(f"{prefix}{group.modules[0]}: {e}") from e


def _report(name: str, s: Solution, tokens: int, seconds: float) -> ModuleReport:
    return ModuleReport(name, s.loss, s.damp_percent, tokens, seconds, s.fallback, s.choice)


def replay_block(
    block: nn.Module,
    groups: Sequence[LinearGroup],
    pairs: Sequence[Pair],
    frames: Sequence[Mapping[str, Any]],
    linears: Mapping[str, IntLinear],
    matmul_dtype: torch.dtype = torch.float32,
    *,
    keep: Keep | None = None,
) -> list[Pair]:
    """Both streams through a finished block; with `keep`, no outputs are returned."""
    after: list[Pair] = []
    with PairedBlock(block, groups, matmul_dtype) as paired:
        for module, linear in linears.items():
            paired.taps[module].use(dequantize(linear))
        paired.forward(pairs, frames, keep or (lambda _, pair: after.append(pair)))
    return after
