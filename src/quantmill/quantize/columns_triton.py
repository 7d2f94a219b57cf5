"""The GPU's twin of `columns.round_columns_torch`: a program takes some rows and runs their column loop in registers.

Rows do not know of each other, so nothing is shared; the GEMMs between blocks stay with the caller.
"""

# mypy: disable-error-code="no-untyped-def, no-any-unimported, misc"
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
    target_row, target_column, carried_row, carried_column, feedback_row,
    scale_row, scale_column, zero_row, zero_column,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, WIDTH)
    row_here, column_here = n < rows, k < columns
    here = row_here[:, None] & column_here[None, :]
    wide = n.to(tl.int64)
    w = tl.load(target + wide[:, None] * target_row + k[None, :] * target_column, here, 0.0)
    t = w + tl.load(carried + wide[:, None] * carried_row + k[None, :] * carried_column, here, 0.0)
    chosen = tl.zeros((ROWS, WIDTH), tl.float32)
    e = tl.zeros((ROWS, WIDTH), tl.float32)
    for i in range(columns):
        now = (k == i)[None, :]
        wanted = tl.sum(tl.where(now, t, 0.0), 1)
        exact = tl.sum(tl.where(now, w, 0.0), 1)
        s = tl.load(scale + wide * scale_row + i * scale_column, row_here, 1.0)
        z = tl.load(zero + wide * zero_row + i * zero_column, row_here, 0.0)
        q = tl.minimum(tl.maximum(nearest(tl.div_rn(wanted, s)) + z, 0.0), top)
        wrong = exact - s * (q - z)
        a = tl.load(feedback + i * feedback_row + k, column_here & (k > i), 0.0)
        t += wrong[:, None] * a[None, :]
        chosen = tl.where(now, q[:, None], chosen)
        e = tl.where(now, wrong[:, None], e)
    place = wide[:, None] * columns + k[None, :]
    tl.store(codes + place, chosen.to(tl.uint8), here)
    tl.store(errors + place, e, here)


def round_columns_triton(
    target: Tensor, carried: Tensor, feedback: Tensor, scale: Tensor, zero: Tensor, max_code: int
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as `columns.round_columns_torch`; any strides, `feedback` with unit rows."""
    rows, columns = target.shape
    codes = torch.empty(target.shape, dtype=torch.uint8, device=target.device)
    errors = torch.empty(target.shape, dtype=torch.float32, device=target.device)
    round_columns_kernel[(triton.cdiv(rows, ROWS),)](
        target, carried, feedback, scale, zero, codes, errors,
        rows, columns, float(max_code),
        *target.stride(), *carried.stride(), feedback.stride(0), *scale.stride(), *zero.stride(),
        ROWS=ROWS, WIDTH=max(16, triton.next_power_of_2(columns)), num_warps=WARPS,
    )  # fmt: skip
    return codes, errors
