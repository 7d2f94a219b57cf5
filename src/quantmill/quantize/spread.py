"""A group of linears solved by all ranks together: every rank its share of the rows, all ranks the whole result."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantmill.quantize.ranks import Ranks
from quantmill.quantize.solver import (
    Solution,
    dequantize,
    energies,
    refuse_non_finite,
    solve_group,
    solve_rows,
    split_rows,
)
from quantmill.types import QuantConfig


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
