"""The GPU's twin of `descent.descend_block_torch`: a program takes some rows and runs their pass in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantmill.quantize.columns_triton import ROWS, WARPS, nearest


@triton.jit
def descend_kernel(
    current, gradient, H, scale, zero, codes, values,
    rows, columns, top,
    current_row, current_column, gradient_row, gradient_column, H_row, H_column,
    scale_row, scale_column, zero_row, zero_column,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    k = tl.arange(0, WIDTH)
    row_here, column_here = n < rows, k < columns
    here = row_here[:, None] & column_here[None, :]
    w = tl.load(current + n[:, None] * current_row + k[None, :] * current_column, here, 0.0)
    g = tl.load(gradient + n[:, None] * gradient_row + k[None, :] * gradient_column, here, 0.0)
    chosen = tl.zeros((ROWS, WIDTH), tl.float32)
    for i in range(columns):
        now = (k == i)[None, :]
        before = tl.sum(tl.where(now, w, 0.0), 1)
        slope = tl.sum(tl.where(now, g, 0.0), 1)
        s = tl.load(scale + n * scale_row + i * scale_column, row_here, 1.0)
        z = tl.load(zero + n * zero_row + i * zero_column, row_here, 0.0)
        h = tl.load(H + i * H_row + k * H_column, column_here & (k >= i), 0.0)
        wanted = before + tl.div_rn(slope, tl.load(H + i * H_row + i * H_column))
        q = tl.minimum(tl.maximum(nearest(tl.div_rn(wanted, s)) + z, 0.0), top)
        after = s * (q - z)
        g -= (after - before)[:, None] * h[None, :]
        chosen = tl.where(now, q[:, None], chosen)
        w = tl.where(now, after[:, None], w)
    place = n[:, None] * columns + k[None, :]
    tl.store(codes + place, chosen.to(tl.uint8), here)
    tl.store(values + place, w, here)


def descend_block_triton(
    current: Tensor, gradient: Tensor, H: Tensor, scale: Tensor, zero: Tensor, max_code: int
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as `descent.descend_block_torch`; any strides."""
    rows, columns = current.shape
    codes = torch.empty(current.shape, dtype=torch.uint8, device=current.device)
    values = torch.empty(current.shape, dtype=torch.float32, device=current.device)
    descend_kernel[(triton.cdiv(rows, ROWS),)](
        current, gradient, H, scale, zero, codes, values,
        rows, columns, float(max_code),
        *current.stride(), *gradient.stride(), *H.stride(), *scale.stride(), *zero.stride(),
        ROWS=ROWS, WIDTH=max(16, triton.next_power_of_2(columns)), num_warps=WARPS,
    )  # fmt: skip
    return codes, values
