"""The CPU twin of `grids.fit_torch`, for all groups of a linear at once: one pass that stays in cache.

Rows are independent and are spread over threads; each row's result does not depend on how many there are.
"""

# mypy: disable-error-code="no-untyped-def, no-any-unimported"
from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from quantmill.quantize.grids import Grid

_SPLIT = np.float32(8193.0)  # 2^13 + 1: Veltkamp's split keeps the top 11 bits of a float32
_SMALLEST_NORMAL = np.float32(2.0**-14)
_SUBNORMAL = np.float32(0.75)  # adding and taking away 0.75 rounds to multiples of 2^-24
_SMALLEST = np.float32(2.0**-24)
_LARGEST = np.float32(65504.0)


@njit(cache=True, inline="always")
def round_fp16(x):
    """A float32 as float16 would hold it, never zero, never infinite."""
    if abs(x) >= _SMALLEST_NORMAL:
        t = x * _SPLIT
        y = t - (t - x)
    else:
        y = (x + _SUBNORMAL) - _SUBNORMAL
    y = min(max(y, -_LARGEST), _LARGEST)
    return y if y != np.float32(0.0) else _SMALLEST


# "reassoc" lets the sums run in vector lanes; nothing else about rounding may change.
@njit(cache=True, fastmath={"reassoc", "contract", "nsz"})
def _error(w, c, scale, zero, top):
    inverse = np.float32(1.0) / scale
    total = np.float32(0.0)
    for j in range(w.size):
        q = np.rint(w[j] * inverse) + zero
        q = min(max(q, np.float32(0.0)), top)
        d = w[j] - scale * (q - zero)
        total += c[j] * d * d
    return total


@njit(cache=True, fastmath={"reassoc", "contract", "nsz"})
def _least_squares(w, c, scale, zero, top):
    inverse = np.float32(1.0) / scale
    up = np.float32(0.0)
    down = np.float32(0.0)
    for j in range(w.size):
        q = np.rint(w[j] * inverse) + zero
        q = min(max(q, np.float32(0.0)), top) - zero
        up += c[j] * w[j] * q
        down += c[j] * q * q
    return up, down


@njit(cache=True)
def _fit_row(w, c, top, free_zero, two_signs, lowest, factors):
    low = min(w.min(), np.float32(0.0))
    high = max(w.max(), np.float32(0.0))
    half = (top + np.float32(1.0)) / np.float32(2.0)
    if free_zero:
        scale0 = max(high - low, _SMALLEST) / top
        zero0 = -low / scale0
    else:
        extreme = low if -low >= high else high
        if extreme == np.float32(0.0):
            extreme = -half * _SMALLEST
        scale0 = -extreme / half
        zero0 = half
    best_s = round_fp16(scale0)
    best_z = min(max(np.rint(zero0), lowest), top)
    best = _error(w, c, best_s, best_z, top)
    for i in range(factors.size):
        for sign in range(2 if two_signs else 1):
            f = factors[i] if sign == 0 else -factors[i]
            s = round_fp16(scale0 * f)
            exact = zero0 * scale0 * factors[i] / s
            for side in range(2 if free_zero else 1):
                z = zero0
                if free_zero:
                    z = np.floor(exact) if side == 0 else np.ceil(exact)
                    z = min(max(z, lowest), top)
                e = _error(w, c, s, z, top)
                if e < best:
                    best, best_s, best_z = e, s, z
    for _ in range(2):
        up, down = _least_squares(w, c, best_s, best_z, top)
        if down > np.float32(0.0) and up != np.float32(0.0):
            s = round_fp16(up / down)
            e = _error(w, c, s, best_z, top)
            if e < best:
                best, best_s = e, s
    return best_s, best_z


@njit(cache=True, parallel=True)
def _fit_all(w, c, size, top, free_zero, two_signs, lowest, factors, scales, zeros):
    rows, columns = w.shape
    for n in prange(rows):
        for g in range(scales.shape[1]):
            a, b = g * size, min((g + 1) * size, columns)
            s, z = _fit_row(w[n, a:b], c[a:b], top, free_zero, two_signs, lowest, factors)
            scales[n, g] = s
            zeros[n, g] = z


def fit_groups(
    w: Tensor, c: Tensor, size: int, max_code: int, grid: Grid, factors: Tensor
) -> tuple[Tensor, Tensor]:
    """Grids of all groups of `size` consecutive columns.

    w (N, K) float32 on the CPU, c (K,) float32 -> scales (N, ceil(K / size)) float32 holding float16
    values, zeros alike.
    """
    groups = -(-w.shape[1] // size)
    scales, zeros = (torch.empty(w.shape[0], groups) for _ in range(2))
    _fit_all(
        w.contiguous().numpy(),
        c.contiguous().numpy(),
        size,
        np.float32(max_code),
        grid.free_zero,
        len(grid.signs) == 2,
        np.float32(grid.lowest_zero),
        factors.numpy(),
        scales.numpy(),
        zeros.numpy(),
    )
    return scales, zeros
