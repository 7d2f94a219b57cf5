"""A group of linears solved by all ranks together: moments of all ranks' tokens, every rank its share of the rows.

All ranks get the whole result, so that each goes on with the same weights. Pure functions of tensors and `Ranks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from quantmill.quantize.hessian import Hessian
from quantmill.quantize.moments import Moments
from quantmill.quantize.presets import Recipe
from quantmill.quantize.ranks import Ranks
from quantmill.quantize.refine import solve_best
from quantmill.quantize.solver import (
    Solution,
    dequantize,
    energies,
    refuse_non_finite,
    solve_group,
    solve_rows,
    split_rows,
)
from quantmill.types import IntLinear, QuantConfig


def solve_spread(weights: Sequence[Tensor], H: Tensor, config: QuantConfig, ranks: Ranks) -> list[Solution]:
    """`solver.solve_group` by all ranks; W and H are the same on all, so all refuse or none does."""
    if ranks.size == 1:
        return solve_group(weights, H, config)
    W, rows = torch.cat(list(weights)), [len(w) for w in weights]
    refuse_non_finite(W, H)
    mine = W[ranks.rows(len(W))]
    part, damp_percent, fallback = solve_rows(mine, H, config)
    linear = ranks.gather_linear(part, len(W))
    losses = ranks.gather_rows(energies(mine, dequantize(part), H), len(W))
    solutions = []
    for share, loss in zip(split_rows(linear, rows), torch.split(losses, rows), strict=True):
        wrong, whole = loss.sum(0).tolist()
        solutions.append(Solution(share, wrong / whole if whole > 0 else 0.0, damp_percent, fallback))
    return solutions


def sum_hessian(hessian: Hessian, ranks: Ranks) -> None:
    """Add the other ranks' tokens to a Hessian whose mean has not been taken."""
    hessian.tokens = ranks.add_up(hessian.sum, hessian.tokens)


def sum_moments(fit: Moments, judge: Moments | None, ranks: Ranks) -> tuple[Moments, Moments | None]:
    """Both over all ranks' tokens. Where one rank holds tokens out, all have a judge."""
    if ranks.size == 1:
        return fit, judge
    if any(ranks.total([float(judge is not None)])) and judge is None:
        judge = fit.empty()
    for moments in filter(None, (fit, judge)):
        sum_hessian(moments.hessian, ranks)
        for part in (moments.cross, moments.mismatch):
            if part is not None:
                ranks.add_up(part, 0)
    return fit, judge


def solve_best_spread(
    weights: Sequence[Tensor],
    fit: Moments,
    judge: Moments | None,
    config: QuantConfig,
    recipe: Recipe,
    ranks: Ranks,
) -> list[Solution]:
    """`refine.solve_best` by all ranks, each its share of the stacked rows; choices go by the sums of all.

    fit, judge: as `sum_moments` leaves them. Raises BadCheckpoint, on all ranks or on none.
    """
    W, counts = torch.cat(list(weights)), [len(w) for w in weights]
    refuse_non_finite(W, fit.hessian.mean())
    rows = ranks.rows(len(W))
    goal, against = fit.goal(W[rows], rows), judge.goal(W[rows], rows) if judge else None
    mine = torch.split(W[rows], _within(counts, rows))
    parts = solve_best(mine, goal, against, config, recipe, ranks.total)
    if ranks.size == 1:
        return parts
    linear = ranks.gather_linear(joined([p.linear for p in parts]), len(W))
    return [replace(p, linear=part) for p, part in zip(parts, split_rows(linear, counts), strict=True)]


def _within(counts: Sequence[int], rows: slice) -> list[int]:
    """How many of each module's rows are among `rows` of all."""
    starts = [sum(counts[:i]) for i in range(len(counts))]
    return [
        max(0, min(rows.stop, start + count) - max(rows.start, start))
        for start, count in zip(starts, counts, strict=True)
    ]


def joined(parts: Sequence[IntLinear]) -> IntLinear:
    """Inverse of `solver.split_rows`."""
    codes, scales, zeros = (torch.cat([getattr(p, n) for p in parts]) for n in ("codes", "scales", "zeros"))
    return IntLinear(codes, scales, zeros, parts[0].g_idx)
