"""A group's grid: scale and zero point for a few columns of every row. Knows no Hessian, only column weights.

Every grid minimises sum_j c_j (w_j - s (q_j - z))^2 over a group's columns, with q_j the nearest code and
c_j the squared pivot of the reversed Cholesky factor: what an error in column j costs once all later
columns have made up for it (docs/quality.md). Unweighted search is known to hurt, so there is none. Scales
are rounded to float16, as they are stored, before they are judged.

Two implementations with one signature: torch (any device, the slow twin) and numba (CPU).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST_SCALE = 2.0**-24  # the smallest positive float16: a group of zeros needs some scale


@dataclass(frozen=True, slots=True)
class Grid:
    """A kind of uniform grid: where the search starts and which zero points it may try."""

    name: str
    signs: tuple[float, ...]  # factors on the starting scale
    free_zero: bool  # try the zero points on both sides of the exact one
    lowest_zero: int  # v1 files cannot store zero 0


SYM = Grid("sym", (1.0, -1.0), free_zero=False, lowest_zero=0)
ASYM = Grid("asym", (1.0,), free_zero=True, lowest_zero=0)
ASYM_V1 = Grid("asym-v1", (1.0,), free_zero=True, lowest_zero=1)

# Shrink factors tried, per bits: coarse grids gain from clipping a lot, fine ones hardly at all.
SHRINK = {2: (0.30, 1.10, 41), 3: (0.40, 1.10, 36), 4: (0.50, 1.10, 31), 8: (0.90, 1.02, 13)}


def shrink_factors(bits: int) -> Tensor:
    """The candidate factors on a group's starting scale, (steps,) float32."""
    low, high, steps = SHRINK[bits]
    return torch.linspace(low, high, steps)


def round_fp16(x: Tensor) -> Tensor:
    """Float32 rounded to what float16 can hold, kept away from zero and from overflow."""
    stored = x.clamp(-65504.0, 65504.0).half().float()
    return torch.where(stored == 0, torch.full_like(stored, SMALLEST_SCALE), stored)


def start(w: Tensor, max_code: int, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and exact (unrounded) zero that just hold each row of a group.

    w (N, G) float32 -> scale (N,), zero (N,) float32. The symmetric scale is signed so that the extreme
    weight falls on code 0, the one code that reaches 2^(bits-1) steps from the zero point (as llama.cpp's
    Q4_0 does).
    """
    low, high = w.amin(1).clamp_max(0), w.amax(1).clamp_min(0)
    half = (max_code + 1) / 2
    if grid.free_zero:
        scale = (high - low).clamp_min(SMALLEST_SCALE) / max_code
        return scale, -low / scale
    extreme = torch.where(-low >= high, low, high)
    extreme = torch.where(extreme == 0, torch.full_like(extreme, -half * SMALLEST_SCALE), extreme)
    return -extreme / half, torch.full_like(extreme, half)


def encode(w: Tensor, scale: Tensor, zero: Tensor, max_code: int) -> Tensor:
    """Nearest codes, float32, of w (N, G) on a grid per row: scale (N,), zero (N,)."""
    return torch.clamp(torch.round(w / scale[:, None]) + zero[:, None], 0, max_code)


def _judge(w: Tensor, c: Tensor, scale: Tensor, zero: Tensor, max_code: int) -> tuple[Tensor, Tensor]:
    """Weighted squared error per row (N,) and the centred codes q - z (N, G) behind it."""
    centred = encode(w, scale, zero, max_code) - zero[:, None]
    return ((w - scale[:, None] * centred).square() * c).sum(1), centred


class _Best:
    """The best candidate so far, row by row."""

    def __init__(self, w: Tensor, c: Tensor, max_code: int, scale: Tensor, zero: Tensor) -> None:
        self.w, self.c, self.max_code = w, c, max_code
        self.scale, self.zero = scale, zero
        self.error, self.centred = _judge(w, c, scale, zero, max_code)

    def offer(self, scale: Tensor, zero: Tensor) -> None:
        error, centred = _judge(self.w, self.c, scale, zero, self.max_code)
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scale = torch.where(better, scale, self.scale)
        self.zero = torch.where(better, zero, self.zero)
        self.centred = torch.where(better[:, None], centred, self.centred)

    def polish(self) -> None:
        """One least-squares step of the scale for the codes found: s = sum c w q / sum c q^2."""
        top = (self.c * self.w * self.centred).sum(1)
        bottom = (self.c * self.centred.square()).sum(1)
        good = (bottom > 0) & (top != 0)
        exact = torch.where(good, top / bottom.clamp_min(1e-30), self.scale)
        self.offer(round_fp16(exact), self.zero)


def fit_torch(w: Tensor, c: Tensor, max_code: int, grid: Grid, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Grid of one group for every row.

    w (N, G) float32, c (G,) float32 weights of the columns, factors (steps,) float32 -> scale (N,) float32
    holding float16 values, zero (N,) float32 holding integers.
    """
    scale0, zero0 = start(w, max_code, grid)
    first = round_fp16(scale0)
    best = _Best(w, c, max_code, first, zero0.round().clamp(grid.lowest_zero, max_code))
    for factor in factors.tolist():
        for sign in grid.signs:
            scale = round_fp16(scale0 * (factor * sign))
            for zero in _zeros(zero0 * scale0 * factor, scale, zero0, max_code, grid):
                best.offer(scale, zero)
    best.polish()
    best.polish()
    return best.scale, best.zero


def _zeros(reach: Tensor, scale: Tensor, zero0: Tensor, max_code: int, grid: Grid) -> tuple[Tensor, ...]:
    """Zero points worth trying: the integers around reach / scale, or the one a symmetric grid has."""
    if not grid.free_zero:
        return (zero0,)
    exact = reach / scale
    return tuple(z.clamp(grid.lowest_zero, max_code) for z in (exact.floor(), exact.ceil()))


def fit_groups_torch(
    w: Tensor, c: Tensor, size: int, max_code: int, grid: Grid, factors: Tensor
) -> tuple[Tensor, Tensor]:
    """Grids of all groups of `size` consecutive columns, the last one may be shorter.

    w (N, K) float32, c (K,) float32 -> scales (N, ceil(K / size)) float32 holding float16 values, zeros alike.
    """
    pairs = [
        fit_torch(group, cost, max_code, grid, factors)
        for group, cost in zip(torch.split(w, size, 1), torch.split(c, size), strict=True)
    ]
    return torch.stack([s for s, _ in pairs], 1), torch.stack([z for _, z in pairs], 1)
