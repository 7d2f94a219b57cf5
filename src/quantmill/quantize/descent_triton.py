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
    scale_row, scale_column, zero_row, zero_column, out_row, out_column,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    k = tl.arange(0, WIDTH)
    row_here, column_here = n < rows, k < columns
    here = row_here[:, None] & column_here[None, :]
    current, scale, zero = current + n * current_row, scale + n * scale_row, zero + n * zero_row
    codes, values = codes + n * out_row, values + n * out_row
    g = tl.load((gradient + n * gradient_row)[:, None] + k[None, :] * gradient_column, here, 0.0)
    before = tl.load(current, row_here, 0.0)
    s, z = tl.load(scale, row_here, 1.0), tl.load(zero, row_here, 0.0)
    h, curve = tl.load(H + k * H_column, column_here, 0.0), tl.load(H)
    for i in range(columns):
        after = tl.minimum(i + 1, columns - 1)  # what the next column needs comes while this one is worked on
        next_before = tl.load(current + after * current_column, row_here, 0.0)
        next_s = tl.load(scale + after * scale_column, row_here, 1.0)
        next_z = tl.load(zero + after * zero_column, row_here, 0.0)
        next_h = tl.load(H + after * H_row + k * H_column, column_here & (k >= after), 0.0)
        next_curve = tl.load(H + after * H_row + after * H_column)
        slope = tl.sum(tl.where((k == i)[None, :], g, 0.0), 1)
        wanted = before + tl.div_rn(slope, curve)
        q = tl.minimum(tl.maximum(nearest(tl.div_rn(wanted, s)) + z, 0.0), top)
        value = s * (q - z)
        tl.store(codes + i * out_column, q.to(tl.uint8), row_here)
        tl.store(values + i * out_column, value, row_here)
        g -= (value - before)[:, None] * h[None, :]
        before, s, z, h, curve = next_before, next_s, next_z, next_h, next_curve


def descend_block_triton(
    current: Tensor, gradient: Tensor, H: Tensor, scale: Tensor, zero: Tensor, max_code: int
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as `descent.descend_block_torch`; fastest where columns are contiguous."""
    rows, columns = current.shape
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=current.device).T
    values = torch.empty(columns, rows, dtype=torch.float32, device=current.device).T
    descend_kernel[(triton.cdiv(rows, ROWS),)](
        current, gradient, H, scale, zero, codes, values,
        rows, columns, float(max_code),
        *current.stride(), *gradient.stride(), *H.stride(), *scale.stride(), *zero.stride(), *codes.stride(),
        ROWS=ROWS, WIDTH=max(16, triton.next_power_of_2(columns)), num_warps=WARPS,
    )  # fmt: skip
    return codes, values
