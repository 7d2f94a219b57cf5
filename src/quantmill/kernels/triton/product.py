"""The kernel that multiplies: a tile of codes becomes the tensor cores' left operand without leaving registers.

The product is computed transposed, weights times inputs, so that few rows of x cost as much as one: 16 of them
fill the smallest instruction. Memory is read ahead by Triton's pipeline (`num_stages` tiles in shared memory).
Where K is split, every part writes its sums, and the part that comes last adds them in a fixed order, so
equal inputs give equal bits. What is added to what depends on the linear and on its number of parts alone,
not on how many rows come together. Knows no tuning.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantmill.kernels.triton.codes import plane, planes_of, words_of

LINE = tl.constexpr(64)  # int16 words in one line of the cache, 128 bytes


@triton.jit
def _prefetch(
    words,
    first,
    last,
    row,
    rows,
    WORDS: tl.constexpr,
    PLACES: tl.constexpr,
    BN: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Ask for a program's first AHEAD tiles: they travel to the L2 cache while the kernel before this one ends."""
    LINES: tl.constexpr = BN * PLACES // LINE
    number = tl.arange(0, AHEAD * LINES)
    tile = tl.minimum(first + number // LINES, last - 1)
    for word in tl.static_range(WORDS):
        at = words + ((tile * WORDS + word).to(tl.int64) * rows + row) * PLACES + number % LINES * LINE
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit(do_not_specialize=["M"])
def product_kernel(
    x,  # (M, K) fp16 or bf16, rows `stride` apart
    words,  # (tiles, WORDS, rows, PLACES) int16
    scales,  # (groups, rows) float16
    zeros,  # (groups, rows) int8; not read unless HAS_ZERO
    order,  # (columns,) int32; not read unless HAS_ORDER
    bias,  # (N,) float16; not read unless HAS_BIAS
    y,  # (M, N) as x
    sums,  # (parts, M, rows) float32; not touched where PARTS is 1
    arrived,  # (row blocks * blocks of x,) int32 zeros, zeros again afterwards
    M,
    N,
    K,
    stride,
    rows,
    tiles,
    tiles_per_group,
    BITS: tl.constexpr,
    PLACES: tl.constexpr,
    GROUP_PLANES: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WHOLE: tl.constexpr,  # K fills the tiles
    BF16: tl.constexpr,
    PARTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
    AHEAD: tl.constexpr,  # tiles asked for before anything else where PDL; a power of two
):
    """One program: BN rows of weights times BM rows of x over one part of K."""
    WORDS: tl.constexpr = words_of(BITS)
    PLANES: tl.constexpr = planes_of(BITS)
    tile_m, block, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    m = tile_m * BM + tl.arange(0, BM)
    n = block * BN + tl.arange(0, BN)
    i = tl.arange(0, PLACES)
    per_part = tl.cdiv(tiles, PARTS)
    first = tl.minimum(part * per_part, tiles)
    last = tl.minimum(first + per_part, tiles)
    if PDL:  # weights depend on no kernel before this one, everything else may
        gdc_launch_dependents()
        _prefetch(words, first, last, block * BN, rows, WORDS, PLACES, BN, AHEAD)
        gdc_wait()

    here = m < M
    x_rows = x + m.to(tl.int64)[:, None] * stride
    w_at = words + ((first * WORDS).to(tl.int64) * rows + n)[:, None] * PLACES + i[None, :]
    total = tl.zeros((BN, BM), tl.float32)
    for tile in tl.range(first, last):
        a = tl.load(w_at, eviction_policy="evict_first")
        b, c = a, a
        if WORDS == 3:
            b = tl.load(w_at + rows * PLACES, eviction_policy="evict_first")
            c = tl.load(w_at + 2 * rows * PLACES, eviction_policy="evict_first")
        for p in tl.static_range(PLANES):
            if p % GROUP_PLANES == 0:
                group = tile // tiles_per_group
                if GROUP_PLANES < PLANES:
                    group = tile * (PLANES // GROUP_PLANES) + p // GROUP_PLANES
                scale = tl.load(scales + group * rows + n).to(tl.float32)
                if HAS_ZERO:
                    zero = tl.load(zeros + group * rows + n).to(x.dtype.element_ty)
                partial = tl.zeros((BN, BM), tl.float32)
            k = (tile * PLANES + p) * PLACES + i
            if HAS_ORDER:
                k = tl.load(order + k)
                inputs = tl.load(x_rows + k[None, :], mask=here[:, None] & (k >= 0)[None, :], other=0.0)
            elif WHOLE:
                inputs = tl.load(x_rows + k[None, :], mask=here[:, None], other=0.0)
            else:
                inputs = tl.load(x_rows + k[None, :], mask=here[:, None] & (k < K)[None, :], other=0.0)
            codes = plane(a, b, c, p, BITS, BF16, ASM)
            if HAS_ZERO:
                codes -= zero[:, None]
            partial = tl.dot(codes, tl.trans(inputs), partial)
            if (p + 1) % GROUP_PLANES == 0:
                total += partial * scale[:, None]
        w_at += WORDS * rows * PLACES

    result = tl.trans(total)
    mask = here[:, None] & (n < N)[None, :]
    if PARTS > 1:
        at = m.to(tl.int64)[:, None] * rows + n[None, :]
        tl.store(sums + (part * rows).to(tl.int64) * M + at, result, mask=here[:, None])
        tl.debug_barrier()  # all of this program's sums are written before it reports
        slot = arrived + block * tl.num_programs(0) + tile_m
        if tl.atomic_add(slot, 1, sem="acq_rel") != PARTS - 1:
            return
        result = tl.zeros((BM, BN), tl.float32)
        for other in tl.static_range(PARTS):
            offset = (other * rows).to(tl.int64) * M
            result += tl.load(sums + offset + at, mask=here[:, None], other=0.0, cache_modifier=".cg")
        tl.store(slot, 0)
    if HAS_BIAS:
        result += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y + m.to(tl.int64)[:, None] * N + n[None, :], result.to(y.dtype.element_ty), mask=mask)
