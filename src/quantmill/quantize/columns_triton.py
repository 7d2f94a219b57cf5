"""The GPU's twin of `columns.round_columns_torch`: a program takes rows and runs their column loop in registers.

Rows do not know of each other, so nothing is shared; the GEMMs between blocks stay with the caller.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16  # of a program
WARPS = 4


@triton.jit
def nearest(x):
    """Round half to even. Exact below 2^22; larger values stay far out of any code's range."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def round_columns_kernel(
    target, carried, feedback, scale, zero, codes, errors,
    rows, columns, top,
    target_row, target_column, carried_row, carried_column, feedback_row, feedback_column,
    scale_row, scale_column, zero_row, zero_column, out_row, out_column,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    k = tl.arange(0, WIDTH)
    row_here, column_here = n < rows, k < columns
    here = row_here[:, None] & column_here[None, :]
    target, scale, zero = target + n * target_row, scale + n * scale_row, zero + n * zero_row
    codes, errors = codes + n * out_row, errors + n * out_row
    t = tl.load(target[:, None] + k[None, :] * target_column, here, 0.0)
    t += tl.load((carried + n * carried_row)[:, None] + k[None, :] * carried_column, here, 0.0)
    w = tl.load(target, row_here, 0.0)
    s, z = tl.load(scale, row_here, 1.0), tl.load(zero, row_here, 0.0)
    a = tl.load(feedback + k * feedback_column, column_here & (k > 0), 0.0)
    for i in range(columns):
        after = tl.minimum(i + 1, columns - 1)  # what the next column needs comes while this one is worked on
        next_w = tl.load(target + after * target_column, row_here, 0.0)
        next_s = tl.load(scale + after * scale_column, row_here, 1.0)
        next_z = tl.load(zero + after * zero_column, row_here, 0.0)
        next_a = tl.load(
            feedback + after * feedback_row + k * feedback_column, column_here & (k > after), 0.0
        )
        wanted = tl.sum(tl.where((k == i)[None, :], t, 0.0), 1)
        q = tl.minimum(tl.maximum(nearest(tl.div_rn(wanted, s)) + z, 0.0), top)
        wrong = w - s * (q - z)
        tl.store(codes + i * out_column, q.to(tl.uint8), row_here)
        tl.store(errors + i * out_column, wrong, row_here)
        t += wrong[:, None] * a[None, :]
        w, s, z, a = next_w, next_s, next_z, next_a


def round_columns_triton(
    target: Tensor, carried: Tensor, feedback: Tensor, scale: Tensor, zero: Tensor, max_code: int
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as `columns.round_columns_torch`; any strides.

    Fastest where columns are contiguous in memory; the results are.
    """
    rows, columns = target.shape
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=target.device).T
    errors = torch.empty(columns, rows, dtype=torch.float32, device=target.device).T
    round_columns_kernel[(triton.cdiv(rows, ROWS),)](
        target, carried, feedback, scale, zero, codes, errors,
        rows, columns, float(max_code),
        *target.stride(), *carried.stride(), *feedback.stride(), *scale.stride(), *zero.stride(),
        *codes.stride(),
        ROWS=ROWS, WIDTH=max(16, triton.next_power_of_2(columns)), num_warps=WARPS,
    )  # fmt: skip
    return codes, errors
