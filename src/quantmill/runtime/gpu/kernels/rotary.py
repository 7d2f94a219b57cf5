"""Rotary embedding and the paged cache: one head of some rows at a time. Knows no attention.

The cache of a layer is (pages, key heads, PAGE, head_dim); in eight bits each key and each value has a float16
scale of its own, (pages, key heads, PAGE).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

FP8_MOST = tl.constexpr(448.0)  # of float8 e4m3


@triton.jit
def rotated(
    source,  # pointer to the first element of a head, (rows, 1) or a scalar
    norm,  # (D,) float32; not read unless HAS_NORM
    cosine,  # (rows or 1, D) float32
    sine,
    d,
    mask,
    D: tl.constexpr,
    EPSILON: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """Heads (rows, D) turned to their position, float32. `mask` (rows, D): which elements there are."""
    HALF: tl.constexpr = D // 2
    partner = tl.where(d < HALF, d + HALF, d - HALF)
    sign = tl.where(d < HALF, -1.0, 1.0)
    value = tl.load(source + d[None, :], mask=mask, other=0.0).to(tl.float32)
    other = tl.load(source + partner[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(value * value, 1) / D + EPSILON)[:, None]
        here = d < D
        value = value * scale * tl.load(norm + d, mask=here, other=0.0)[None, :]
        other = other * scale * tl.load(norm + partner, mask=here, other=0.0)[None, :]
    return value * cosine + other * sine * sign[None, :]


@triton.jit
def turns(table, positions, d, D: tl.constexpr):
    """Cosines or sines (rows or 1, D) of positions, (rows, 1) or a number."""
    at = positions.to(tl.int64) * (D // 2) + d[None, :] % (D // 2)
    return tl.load(table + at, mask=(d < D)[None, :], other=0.0)


@triton.jit
def _eighth(value):
    """Vectors (rows or 1, D) float32 in eight bits, and their scales (rows or 1, 1) float16."""
    most = tl.max(tl.abs(value), 1)[:, None]
    scale = tl.maximum(most / FP8_MOST, 1e-6).to(tl.float16)
    small = value / scale.to(tl.float32)
    return tl.minimum(tl.maximum(small, -FP8_MOST), FP8_MOST).to(tl.float8e4nv), scale


@triton.jit
def as_stored(value, x_type: tl.constexpr, FP8: tl.constexpr):
    """Keys or values (rows or 1, D) float32 as they will be when they are read from the cache."""
    if FP8:
        small, scale = _eighth(value)
        value = small.to(tl.float32) * scale.to(tl.float32)
    return value.to(x_type).to(tl.float32)


@triton.jit
def store_vectors(cache, scales, slots, value, here, d, D: tl.constexpr, FP8: tl.constexpr):
    """Keys or values (rows or 1, D) float32 of one head into the cache at `slots`, (rows, 1) or a number."""
    at = cache + slots * D + d[None, :]
    mask = (d < D)[None, :] & here
    if FP8:
        small, scale = _eighth(value)
        tl.store(scales + slots + tl.zeros_like(scale).to(tl.int64), scale, mask=here)
        tl.store(at, small.to(tl.uint8, bitcast=True), mask=mask)
    else:
        tl.store(at, value.to(cache.dtype.element_ty), mask=mask)


@triton.jit
def load_block(
    cache,
    first,
    written,  # of the N, how many hold something; not looked at unless MASKED
    d,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    N: tl.constexpr,
    FP8: tl.constexpr,
    MASKED: tl.constexpr,
    x_type: tl.constexpr,
):
    """(N, BLOCK_D) keys or values that lie side by side from slot `first` on, in the type of the products."""
    lane = tl.arange(0, N)[:, None]
    at = cache + (first + lane) * D + d[None, :]
    if MASKED:
        block = tl.load(at, mask=(d < D)[None, :] & (lane < written), other=0)
    elif BLOCK_D == D:
        block = tl.load(at)
    else:
        block = tl.load(at, mask=(d < D)[None, :], other=0)
    if FP8:
        block = block.to(tl.float8e4nv, bitcast=True).to(x_type)
    return block


@triton.jit
def prefetch_block(cache, first, D: tl.constexpr, N: tl.constexpr):
    """Ask for N vectors that lie side by side: they travel to the L2 cache, nothing waits for them."""
    LINE: tl.constexpr = 128 // (cache.dtype.element_ty.primitive_bitwidth // 8)  # elements of a line of it
    at = cache + first * D + tl.arange(0, N * D // LINE) * LINE
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def prefetch_ahead(cache, first, D: tl.constexpr, N: tl.constexpr):
    """The same by the copy engine, in one instruction of one thread (9.0)."""
    at = (cache + first * D).to(tl.int64)
    nbytes = (at * 0).to(tl.int32) + N * D * (cache.dtype.element_ty.primitive_bitwidth // 8)
    tl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0; "
        "@p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r",
        [at, nbytes],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def prefetch_rows(matrix, rows, columns):
    """Ask for the first 512 bytes of some rows, as prefetch_block does."""
    LINE: tl.constexpr = 128 // (matrix.dtype.element_ty.primitive_bitwidth // 8)
    first = tl.minimum(tl.arange(0, 4) * LINE, columns - 1)
    at = matrix + rows.to(tl.int64)[:, None] * columns + first[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit(do_not_specialize=["rows"])
def cache_kernel(
    qkv,  # (rows, (H + 2 KVH) * D) fp16 or bf16
    key_norm,  # (D,) float32; not read unless HAS_NORM
    cosines,  # (context, D / 2) float32
    sines,
    keys,  # (pages, KVH, PAGE, D) as qkv, or uint8 where FP8
    values,
    key_scales,  # (pages, KVH, PAGE) float16; not touched unless FP8
    value_scales,
    positions,  # (rows,) int32; below 0: no token
    sequences,  # (rows,) int32: the row's line in `pages`
    pages,  # (sequences, stride) int32
    page_stride,
    rows,
    H: tl.constexpr,
    KVH: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    EPSILON: tl.constexpr,
    HAS_NORM: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program writes one key head's keys and values of BLOCK rows into the cache."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row, head = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    position = tl.load(positions + row, mask=row < rows, other=-1)
    here = position >= 0
    position = tl.maximum(position, 0)
    d = tl.arange(0, BLOCK_D)
    mask = here[:, None] & (d < D)[None, :]
    line = tl.load(sequences + row, mask=here, other=0)
    page = tl.load(pages + line * page_stride + position // PAGE, mask=here, other=0)
    slot = ((page.to(tl.int64) * KVH + head) * PAGE + position % PAGE)[:, None]
    source = qkv + row.to(tl.int64)[:, None] * ((H + 2 * KVH) * D) + (H + head) * D
    cosine, sine = turns(cosines, position[:, None], d, D), turns(sines, position[:, None], d, D)
    key = rotated(source, key_norm, cosine, sine, d, mask, D, EPSILON, HAS_NORM)
    store_vectors(keys, key_scales, slot, key, here[:, None], d, D, FP8)
    value = tl.load(source + KVH * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
    store_vectors(values, value_scales, slot, value, here[:, None], d, D, FP8)


@triton.jit(do_not_specialize=["rows"])
def turn_kernel(
    qkv,  # (rows, (H + 2 KVH) * D) fp16 or bf16
    query_norm,  # (D,) float32; these two not read unless HAS_NORM
    key_norm,
    cosines,  # (context, D / 2) float32
    sines,
    keys,  # (pages, KVH, PAGE, D) as qkv
    values,
    positions,  # (rows,) int32; below 0: filler, nothing of it is kept
    pages,  # the pages of the one sequence, int32
    turned,  # (rows, (H + 2 KVH) * D) as qkv
    rows,
    H: tl.constexpr,
    KVH: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    EPSILON: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program turns one head of BLOCK rows of one sequence; a key takes its value along, also to their page."""
    row, head = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    here = row < rows
    position = tl.load(positions + row, mask=here, other=-1)
    kept = position >= 0
    position = tl.maximum(position, 0)
    d = tl.arange(0, BLOCK_D)
    mask = here[:, None] & (d < D)[None, :]
    first = row.to(tl.int64)[:, None] * ((H + 2 * KVH) * D) + head * D
    at = first + d[None, :]
    cosine, sine = turns(cosines, position[:, None], d, D), turns(sines, position[:, None], d, D)
    norm = query_norm
    if head >= H:
        norm = key_norm
    vectors = rotated(qkv + first, norm, cosine, sine, d, mask, D, EPSILON, HAS_NORM)
    tl.store(turned + at, vectors.to(turned.dtype.element_ty), mask=mask)
    if head >= H:
        page = tl.load(pages + position // PAGE, mask=kept, other=0)
        slot = ((page.to(tl.int64) * KVH + head - H) * PAGE + position % PAGE)[:, None]
        store_vectors(keys, keys, slot, vectors, kept[:, None], d, D, False)
        value = tl.load(qkv + at + KVH * D, mask=mask, other=0.0)
        tl.store(turned + at + KVH * D, value, mask=mask)
        store_vectors(values, values, slot, value, kept[:, None], d, D, False)
