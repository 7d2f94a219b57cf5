"""The GPU's twin of `grids.fit_torch`, for all groups of a linear at once: a program takes one group of some rows.

Same search as `grids_numba`, candidate for candidate; only sums run in another order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantmill.quantize.columns_triton import nearest
from quantmill.quantize.grids import Grid

TILE = 2048  # weights of a program


@triton.jit
def as_fp16(x):
    """A float32 as float16 holds it, never zero, never infinite."""
    y = tl.minimum(tl.maximum(x, -65504.0), 65504.0).to(tl.float16).to(tl.float32)
    return tl.where(y == 0.0, 5.9604644775390625e-08, y)


@triton.jit
def centred(w, s, z, top):
    """Codes less their zero point, of w (ROWS, WIDTH) on the grids s, z (ROWS,)."""
    q = nearest(w * tl.div_rn(1.0, s)[:, None]) + z[:, None]
    return tl.minimum(tl.maximum(q, 0.0), top) - z[:, None]


@triton.jit
def error(w, c, s, z, top):
    """The weighted squared error of every row."""
    d = w - s[:, None] * centred(w, s, z, top)
    return tl.sum(c * d * d, 1)


@triton.jit
def start(w, top, FREE: tl.constexpr):
    """Scale and exact zero that just hold each row."""
    low, high = tl.minimum(tl.min(w, 1), 0.0), tl.maximum(tl.max(w, 1), 0.0)
    half = (top + 1.0) / 2.0
    if FREE:
        scale = tl.div_rn(tl.maximum(high - low, 5.9604644775390625e-08), top)
        zero = tl.div_rn(-low, scale)
    else:
        extreme = tl.where(-low >= high, low, high)
        extreme = tl.where(extreme == 0.0, -half * 5.9604644775390625e-08, extreme)
        scale = tl.div_rn(-extreme, half)
        zero = tl.zeros_like(extreme) + half
    return scale, zero


@triton.jit
def fit_kernel(
    w, c, factors, scales, zeros, rows, columns, row_stride, size, groups, steps, top, lowest,
    FREE: tl.constexpr, SIGNS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    group = tl.program_id(1)
    k = group * size + tl.arange(0, WIDTH)
    column_here = (tl.arange(0, WIDTH) < size) & (k < columns)
    x = tl.load(w + n[:, None] * row_stride + k[None, :], (n < rows)[:, None] & column_here[None, :], 0.0)
    cost = tl.load(c + k, column_here, 0.0)[None, :]  # a column that is not there costs nothing
    scale0, zero0 = start(x, top, FREE)
    s = as_fp16(scale0)
    z = tl.minimum(tl.maximum(nearest(zero0), lowest), top)
    best = error(x, cost, s, z, top)
    for step in range(steps):
        f = tl.load(factors + step)
        for sign in tl.static_range(SIGNS):
            tried = as_fp16(scale0 * (f if sign == 0 else -f))
            if FREE:
                exact = tl.div_rn(zero0 * scale0 * f, tried)
                for side in tl.static_range(2):
                    point = tl.floor(exact) if side == 0 else tl.ceil(exact)
                    point = tl.minimum(tl.maximum(point, lowest), top)
                    found = error(x, cost, tried, point, top)
                    s, z = tl.where(found < best, tried, s), tl.where(found < best, point, z)
                    best = tl.minimum(found, best)
            else:
                found = error(x, cost, tried, zero0, top)
                s, z = tl.where(found < best, tried, s), tl.where(found < best, zero0, z)
                best = tl.minimum(found, best)
    for _ in tl.static_range(2):  # least squares: s = sum c w q / sum c q^2
        q = centred(x, s, z, top)
        up, down = tl.sum(cost * x * q, 1), tl.sum(cost * q * q, 1)
        usable = (down > 0.0) & (up != 0.0)
        tried = as_fp16(tl.where(usable, tl.div_rn(up, tl.where(usable, down, 1.0)), s))
        found = error(x, cost, tried, z, top)
        s = tl.where(found < best, tried, s)
        best = tl.minimum(found, best)
    tl.store(scales + n * groups + group, s, n < rows)
    tl.store(zeros + n * groups + group, z, n < rows)


def fit_groups(
    w: Tensor, c: Tensor, size: int, max_code: int, grid: Grid, factors: Tensor
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as `grids_numba.fit_groups`; tensors on the GPU."""
    rows, columns = w.shape
    groups = triton.cdiv(columns, size)
    w = w if w.stride(1) == 1 else w.contiguous()
    scales, zeros = (torch.empty(rows, groups, device=w.device) for _ in range(2))
    width = triton.next_power_of_2(size)
    taken = max(1, TILE // width)
    fit_kernel[(triton.cdiv(rows, taken), groups)](
        w, c.contiguous(), factors.to(w.device), scales, zeros,
        rows, columns, w.stride(0), size, groups, len(factors), float(max_code), float(grid.lowest_zero),
        FREE=grid.free_zero, SIGNS=len(grid.signs), ROWS=taken, WIDTH=width,
        num_warps=4 if width <= TILE else 8,
    )  # fmt: skip
    return scales, zeros
