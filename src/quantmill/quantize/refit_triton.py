"""The GPU's twin of `refit.group_products`: B^T H B of every row on tensor cores, nothing large in between.

Codes are small integers, exact in bfloat16; H is taken as the sum of three bfloat16 matrices, which hold 24
bits of it. So products are exact and sums are float32: no worse than a float32 GEMM.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 128  # of a program
PARTS = 3
INTERPRETED = triton.knobs.runtime.interpret
KIND = tl.float32 if INTERPRETED else tl.bfloat16  # numpy knows no bfloat16; the values are the same
WIDEST = 128  # wider groups are few: there GEMMs over whole groups serve


@triton.jit
def group_products_kernel(
    codes, parts, products, rows, groups, padded, part_stride,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, DEEP: tl.constexpr, PARTS: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    j = groups - 1 - tl.program_id(0)  # the longest first
    n = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    k, deep = tl.arange(0, WIDTH), tl.arange(0, DEEP)
    row_here = n < rows
    line = n.to(tl.int64) * padded
    mine = tl.load(codes + line[:, None] + (j * WIDTH + k)[None, :], row_here[:, None], 0.0).to(tl.float32)
    place = products + n.to(tl.int64) * groups * groups
    for i in range(j + 1):
        p = tl.zeros((ROWS, WIDTH), tl.float32)
        for chunk in tl.static_range(WIDTH // DEEP):
            at = i * WIDTH + chunk * DEEP + deep
            q = tl.load(codes + line[:, None] + at[None, :], row_here[:, None], 0.0)
            here = parts + at.to(tl.int64)[:, None] * padded + (j * WIDTH + k)[None, :]
            for part in tl.static_range(PARTS):
                p = tl.dot(q.to(KIND), tl.load(here + part * part_stride).to(KIND), p)
        m = tl.sum(p * mine, 1)  # outside of any branch: what a branch reads of a dot may not be there yet
        tl.store(place + i * groups + j, m, row_here)
        tl.store(place + j * groups + i, m, row_here)


def split(H: Tensor) -> Tensor:
    """H as three bfloat16 matrices whose sum it is, to 24 bits: (3, K, K)."""
    parts = torch.empty(PARTS, *H.shape, dtype=torch.bfloat16, device=H.device)
    rest = H
    for part in parts:
        part.copy_(rest)
        rest = rest - part.float()
    return parts


def group_products(parts: Tensor, codes: Tensor, width: int) -> Tensor:
    """M = B^T H B of every row, (n, groups, groups) float32.

    codes (n, groups * width) bfloat16: centred codes, group by group, a short group filled up with zeros;
    parts (3, groups * width, groups * width): `split` of H in the same order.
    """
    rows, padded = codes.shape
    groups = padded // width
    products = torch.empty(rows, groups, groups, device=codes.device)
    group_products_kernel[(groups, triton.cdiv(rows, ROWS))](
        codes, parts, products, rows, groups, padded, parts.stride(0),
        ROWS=ROWS, WIDTH=width, DEEP=min(width, 64), PARTS=PARTS, KIND=KIND,
        num_warps=8 if width > 64 else 4, num_stages=1 if width > 64 else 3,
    )  # fmt: skip
    return products
