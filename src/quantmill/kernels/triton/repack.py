"""Kernels that read a linear once: from the file's words to tiles, and from tiles to a dense matrix. No choices."""

from __future__ import annotations

import triton
import triton.language as tl

from quantmill.kernels.triton.codes import plane, planes_of, stored_code, words_of


@triton.jit
def repack_kernel(
    qweight,  # (ceil(K * BITS / 32), N) int32
    order,  # (columns,) int32: which input each place of the tiles takes; below 0: none
    words,  # (tiles, WORDS, rows, PLACES) int16
    N,
    rows,
    BITS: tl.constexpr,
    PLACES: tl.constexpr,
    BN: tl.constexpr,
):
    """One program fills BN rows of one tile."""
    WORDS: tl.constexpr = words_of(BITS)
    CODES: tl.constexpr = 5 if BITS == 3 else planes_of(BITS)
    tile = tl.program_id(0)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    i = tl.arange(0, PLACES)
    first = order + tile * planes_of(BITS) * PLACES + i
    if BITS == 3:
        k = tl.load(first + 15 * PLACES)
        spread = stored_code(qweight, k[:, None], n[None, :], (k >= 0)[:, None] & (n < N)[None, :], N, 3)
    for word in tl.static_range(WORDS):
        value = tl.zeros((PLACES, BN), tl.int32)
        for j in tl.static_range(CODES):
            k = tl.load(first + (word * CODES + j) * PLACES)
            mask = (k >= 0)[:, None] & (n < N)[None, :]
            value |= stored_code(qweight, k[:, None], n[None, :], mask, N, BITS) << (j * BITS)
        if BITS == 3:
            value |= ((spread >> word) & 1) << 15
        at = ((tile * WORDS + word).to(tl.int64) * rows + n)[None, :] * PLACES + i[:, None]
        tl.store(words + at, value.to(tl.int16))


@triton.jit
def dequantise_kernel(
    words,
    scales,  # (groups, rows) float16
    zeros,  # (groups, rows) int8: zero point less 2**(BITS - 1); not read unless HAS_ZERO
    order,  # (columns,) int32; not read unless HAS_ORDER
    weight,  # (N, K) fp16 or bf16: the places' order, K of them
    N,
    K,
    rows,
    tiles_per_group,
    BITS: tl.constexpr,
    PLACES: tl.constexpr,
    GROUP_PLANES: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    BF16: tl.constexpr,
    BN: tl.constexpr,
    ASM: tl.constexpr,
):
    """One program writes BN rows of one tile, each weight rounded once; places that take no input give 0."""
    WORDS: tl.constexpr = words_of(BITS)
    PLANES: tl.constexpr = planes_of(BITS)
    tile = tl.program_id(0)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    i = tl.arange(0, PLACES)
    at = words + ((tile * WORDS).to(tl.int64) * rows + n)[:, None] * PLACES + i[None, :]
    a = tl.load(at)
    b, c = a, a
    if WORDS == 3:
        b = tl.load(at + rows * PLACES)
        c = tl.load(at + 2 * rows * PLACES)
    for p in tl.static_range(PLANES):
        group = tile // tiles_per_group
        if GROUP_PLANES < PLANES:
            group = tile * (PLANES // GROUP_PLANES) + p // GROUP_PLANES
        value = plane(a, b, c, p, BITS, BF16, ASM).to(tl.float32)
        if HAS_ZERO:
            value -= tl.load(zeros + group * rows + n).to(tl.float32)[:, None]
        value *= tl.load(scales + group * rows + n).to(tl.float32)[:, None]
        k = (tile * PLANES + p) * PLACES + i
        if HAS_ORDER:
            value = tl.where((tl.load(order + k) >= 0)[None, :], value, 0.0)
        mask = (n < N)[:, None] & (k < K)[None, :]
        tl.store(
            weight + n.to(tl.int64)[:, None] * K + k[None, :], value.to(weight.dtype.element_ty), mask=mask
        )
