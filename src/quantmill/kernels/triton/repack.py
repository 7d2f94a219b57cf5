"""Kernels that read a linear once: from the file's words to tiles, and from tiles to a dense matrix. No choices."""

from __future__ import annotations

import triton
import triton.language as tl

from quantmill.kernels.triton.codes import code, plane_at, planes, stored_code, words_in


@triton.jit
def _column(plane, quad, j, half, NARROW: tl.constexpr):
    """Column within a unit of thread `quad`'s code in a plane, register pair j, half of the word."""
    if NARROW:
        return plane * 16 + quad * 4 + j * 2 + half
    return (plane >> 1) * 32 + quad * 8 + (plane & 1) * 4 + j * 2 + half


@triton.jit
def repack_kernel(
    qweight,  # (ceil(K * BITS / 32), N) int32
    order,  # (columns,) int32: which input each place of the tiles takes; below 0: none
    words,  # (tiles, units, WORDS, 32, 4) int32
    N,
    units,
    BITS: tl.constexpr,
    NARROW: tl.constexpr,
    TILES: tl.constexpr,
):
    """One program fills one unit of TILES tiles."""
    WORDS: tl.constexpr = words_in(BITS)
    PLANES: tl.constexpr = planes(BITS)
    CODES: tl.constexpr = 5 if BITS == 3 else PLANES
    unit = tl.program_id(1)
    at = tl.arange(0, TILES * 128)
    tile, g, quad, r = tl.program_id(0) * TILES + at // 128, (at >> 4) & 7, (at >> 2) & 3, at & 3
    n = tile * 16 + g + 8 * (r & 1)
    first = order + unit * PLANES * 16
    if BITS == 3:
        spread = at * 0
        for half in tl.static_range(2):
            k = tl.load(first + _column(15, quad, r >> 1, half, NARROW))
            value = stored_code(qweight, k, n, (k >= 0) & (n < N), N, 3)
            spread |= value << (3 * half)
    for word in tl.static_range(WORDS):
        value = at * 0
        for j in tl.static_range(CODES):
            for half in tl.static_range(2):
                k = tl.load(first + _column(plane_at(word, j, BITS), quad, r >> 1, half, NARROW))
                found = stored_code(qweight, k, n, (k >= 0) & (n < N), N, BITS)
                value |= found << (j * BITS + 16 * half)
        if BITS == 3:
            value |= ((spread >> word) & 1) << 15 | ((spread >> (3 + word)) & 1) << 31
        to = ((tile.to(tl.int64) * units + unit) * WORDS + word) * 128 + at % 128
        tl.store(words + to, value)


@triton.jit
def dequantise_kernel(
    words,
    scales,  # (tiles, groups, 16) float16
    zeros,  # the same; not read unless HAS_ZERO
    weight,  # (N, K) fp16 or bf16: the places' order, K of them
    N,
    K,
    units,
    groups,
    group,
    BITS: tl.constexpr,
    NARROW: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    BN: tl.constexpr,
):
    """One program writes BN rows of one unit, each weight rounded once.

    Plain, for any GPU and for the interpreter; expand.py has the fast one.
    """
    WORDS: tl.constexpr = words_in(BITS)
    PLANES: tl.constexpr = planes(BITS)
    unit = tl.program_id(0)
    n = (tl.program_id(1) * BN + tl.arange(0, BN))[:, None]
    i = tl.arange(0, 16)[None, :]
    quad, j, half = i >> 2, (i >> 1) & 1, i & 1
    inside = ((n & 7) * 4 + quad) * 4 + ((n >> 3) & 1) + 2 * j
    at = words + ((n >> 4).to(tl.int64) * units + unit) * (WORDS * 128) + inside
    a = tl.load(at)
    b, c = a, a
    if WORDS == 3:
        b = tl.load(at + 128)
        c = tl.load(at + 256)
    for p in tl.static_range(PLANES):
        k = unit * PLANES * 16 + _column(p, quad, j, half, NARROW)
        value = (code(a, b, c, half, p, BITS) - (1 << (BITS - 1))).to(tl.float32)
        pair = ((n >> 4) * groups + k // group) * 16 + (n & 7) * 2 + ((n >> 3) & 1)
        if HAS_ZERO:
            value += tl.load(zeros + pair).to(tl.float32)
        value *= tl.load(scales + pair).to(tl.float32)
        to = weight + n.to(tl.int64) * K + k
        tl.store(to, value.to(weight.dtype.element_ty), mask=(n < N) & (k < K))
