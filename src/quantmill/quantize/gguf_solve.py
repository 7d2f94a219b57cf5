"""One linear onto a GGUF block type: grids, rounding with error feedback, refits, descent. Knows no models.

    fit all grids (weighted by pivots) -> round the columns, most active first -> (refit d and m, descend) x rounds

The same error feedback as solver.py; a minimum is taken off the target before the columns are rounded, so that
the column loop and the descent see a plain symmetric grid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from quantmill.formats.gguf import BlockType
from quantmill.quantize.kgrids import SMALLEST, BlockGrid, dequantize, fit, half
from quantmill.quantize.machines import machine_of
from quantmill.quantize.solver import BLOCK, Factor

ROUNDS = 3  # of descent and refit
RIDGE = 1e-3
PRODUCTS = 1 << 24  # elements of all rows' normal equations at once
Judge = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class BlockLinear:
    """A solved linear in a GGUF type."""

    grid: BlockGrid
    codes: Tensor  # (N, K) uint8

    @property
    def weight(self) -> Tensor:
        """W (N, K) float32 that it stands for."""
        return dequantize(self.grid, self.codes)


def solve_blocks(W: Tensor, factor: Factor, kind: BlockType, rounds: int = ROUNDS) -> BlockLinear:
    """Quantise W (N, K) float32 with the factor of its inputs' Hessian. K is a multiple of kind.block."""
    linear = refit_blocks(W, factor.damped, fed_back(W, factor, kind))
    for _ in range(rounds):
        linear = refit_blocks(W, factor.damped, _descend(W, factor.damped, linear))
    return linear


def solve_towards(
    T: Tensor, factor: Factor, kind: BlockType, judge: Judge, rounds: int
) -> tuple[BlockLinear, int]:
    """`solve_blocks` of a target T (N, K); a step is kept only where the judge's loss falls. And how many were.

    judge: weights (N, K) -> loss per row (N,), on tokens that nothing is fitted to.
    """
    linear, kept = fed_back(T, factor, kind), 0
    least = float(judge(linear.weight).sum())
    for step in (refit_blocks, *(s for _ in range(rounds) for s in (_descend, refit_blocks))):
        tried = step(T, factor.damped, linear)
        loss = float(judge(tried.weight).sum())
        if loss < least:
            linear, least, kept = tried, loss, kept + 1
    return linear, kept


def fed_back(W: Tensor, factor: Factor, kind: BlockType) -> BlockLinear:
    """Grids fitted with the pivots as costs, then every column rounded with error feedback."""
    cost = torch.empty_like(factor.cost)
    cost[factor.order] = factor.cost
    grid = fit(W, cost, kind)
    return BlockLinear(grid, _round(W, factor, grid))


def round_to_nearest(W: Tensor, kind: BlockType) -> BlockLinear:
    """Quantise W (N, K) without a Hessian, as embeddings are: every column costs the same."""
    grid = fit(W, torch.ones(W.shape[1], device=W.device), kind)
    scale, offset = _columns(grid)
    codes = ((W - offset) / scale).round_().add_(kind.zero).clamp_(0, kind.max_code)
    return BlockLinear(grid, codes.to(torch.uint8))


def _columns(grid: BlockGrid) -> tuple[Tensor, Tensor]:
    """Scale, never 0, and offset of every column, (N, K) float32."""
    scale = torch.where(grid.scale == 0, torch.full_like(grid.scale, SMALLEST), grid.scale)
    group = grid.kind.group
    return scale.repeat_interleave(group, 1), grid.offset.repeat_interleave(group, 1)


def _round(W: Tensor, factor: Factor, grid: BlockGrid) -> Tensor:
    """Codes (N, K) uint8 in original order."""
    order, A, rounder = factor.order, factor.feedback, machine_of(W.device).round_columns
    scale, offset = _columns(grid)
    T, scale = (W - offset)[:, order], scale[:, order]
    E, codes = torch.zeros_like(T), torch.empty(T.shape, dtype=torch.uint8, device=T.device)
    zero = torch.full_like(T[:, :BLOCK], float(grid.kind.zero))
    for i in range(0, T.shape[1], BLOCK):
        now = slice(i, min(i + BLOCK, T.shape[1]))
        carried, z = E[:, :i] @ A[:i, now], zero[:, : now.stop - i]
        codes[:, now], E[:, now] = rounder(
            T[:, now], carried, A[now, now], scale[:, now], z, grid.kind.max_code
        )
    original = torch.empty_like(codes)
    original[:, order] = codes
    return original


def _descend(W: Tensor, H: Tensor, linear: BlockLinear) -> BlockLinear:
    """One sweep of coordinate descent over all columns, most active first."""
    grid, block = linear.grid, machine_of(W.device).descend_block
    order = torch.argsort(H.diagonal(), descending=True, stable=True)
    scale, offset = (t[:, order] for t in _columns(grid))
    Hp, T = H[order][:, order], W[:, order] - offset
    E, codes = T - (linear.weight[:, order] - offset), torch.empty_like(linear.codes)
    zero = torch.full_like(T[:, :BLOCK], float(grid.kind.zero))
    for i in range(0, T.shape[1], BLOCK):
        now = slice(i, min(i + BLOCK, T.shape[1]))
        z = zero[:, : now.stop - i]
        codes[:, order[now]], values = block(
            T[:, now] - E[:, now], E @ Hp[:, now], Hp[now, now], scale[:, now], z, grid.kind.max_code
        )
        E[:, now] = T[:, now] - values
    return BlockLinear(grid, codes)


def refit_blocks(W: Tensor, H: Tensor, linear: BlockLinear, ridge: float = RIDGE) -> BlockLinear:
    """d and m that minimise the loss with codes and integers held; rows that do not gain keep theirs.

    Per row, with B (K, unknowns) one column for every block's d and one for its m: (B^T H B + rho I) s =
    B^T H w + rho s_old, s rounded to float16.
    """
    grid = linear.grid
    blocks = grid.d.shape[1]
    unknowns = blocks * (2 if grid.kind.has_min else 1)
    spread = nn.functional.one_hot(
        torch.arange(W.shape[1], device=W.device) // grid.kind.block, blocks
    ).float()
    step = max(1, PRODUCTS // unknowns**2)
    parts = []
    for rows in torch.split(torch.arange(len(W), device=W.device), step):
        basis = _basis(grid, linear.codes[rows], rows)
        old = torch.cat([grid.d[rows], *([] if grid.m is None else [grid.m[rows]])], 1)
        parts.append(_best(W[rows], H, basis, spread, grid.kind.block, old, ridge))
    stored = torch.cat(parts)
    m = stored[:, blocks:] if grid.kind.has_min else None
    return BlockLinear(replace(grid, d=stored[:, :blocks].contiguous(), m=m), linear.codes)


def _basis(grid: BlockGrid, codes: Tensor, rows: Tensor) -> list[Tensor]:
    """What d multiplies in every column, and what m does; (n, K) float32 each."""
    level = codes.float() - grid.kind.zero
    group = grid.kind.group
    if grid.scales is not None:
        level *= grid.scales[rows].float().repeat_interleave(group, 1)
    if grid.m is None:
        return [level]
    if grid.mins is None:
        return [level, torch.ones_like(level)]
    return [level, -grid.mins[rows].float().repeat_interleave(group, 1)]


def _best(
    W: Tensor, H: Tensor, basis: list[Tensor], spread: Tensor, size: int, old: Tensor, ridge: float
) -> Tensor:
    blocks = spread.shape[1]
    M = torch.empty(len(W), old.shape[1], old.shape[1], dtype=torch.float64, device=W.device)
    wide = W @ H
    r = torch.cat([(wide * b) @ spread for b in basis], 1).double()
    for i, left in enumerate(basis):
        for b in range(blocks):
            now = slice(b * size, (b + 1) * size)
            product = left[:, now] @ H[now]
            for j, right in enumerate(basis):
                M[:, i * blocks + b, j * blocks : (j + 1) * blocks] = ((product * right) @ spread).double()
    rho = ridge * M.diagonal(dim1=1, dim2=2).mean(1, keepdim=True) + SMALLEST
    new = half(torch.linalg.solve(M + torch.diag_embed(rho.expand_as(old)), r + rho * old).float())
    new = torch.where(torch.isfinite(new), new, old)
    gain = _quadratic(M, r, old) - _quadratic(M, r, new)
    return torch.where(gain[:, None] > 0, new, old)


def _quadratic(M: Tensor, r: Tensor, s: Tensor) -> Tensor:
    wide = s.double()
    return torch.einsum("ni,nij,nj->n", wide, M, wide) - 2 * (wide * r).sum(1)
