"""Attention over pages: `rows_kernel` for single rows (decoding), `tile_kernel` for many rows of one sequence.

Both keep running maxima and sums (Milakov & Gimelshein, arXiv 1805.02867) as FlashAttention does; the first also
cuts long texts into parts, as flash decoding does, and the part that comes last adds the parts in their order.
How a row is cut depends on its position alone, so its bits do not depend on what else is in the pass.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantmill.runtime.gpu.kernels.rotary import load_block, rotated, store_vector

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _absorb(
    q,  # (ROWS, BLOCK_D)
    most,  # (ROWS,) running maximum, in powers of two
    total,  # (ROWS,)
    mixed,  # (ROWS, BLOCK_D)
    slot,  # first slot of the block of keys
    key_at,  # position of the first key
    low,  # (ROWS,) first position a row sees
    high,  # (ROWS,) last position a row sees
    keys,
    values,
    key_scales,
    value_scales,
    d,
    SCALE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    FP8: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One page of keys and values into the running sums."""
    lane = tl.arange(0, PAGE)
    written = tl.max(high, 0) + 1 - key_at  # places behind it may hold anything
    k = load_block(keys, slot, written, d, D, BLOCK_D, PAGE, FP8, False, q.dtype)
    scores = tl.dot(q, tl.trans(k)) * (SCALE * LOG2E)
    if FP8:
        scores *= tl.load(key_scales + slot + lane).to(tl.float32)[None, :]
    if MASKED:
        at = key_at + lane
        seen = (at[None, :] <= high[:, None]) & (at[None, :] >= low[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    new = tl.maximum(most, tl.max(scores, 1))
    safe = tl.where(new == float("-inf"), 0.0, new)
    shrink = tl.exp2(most - safe)
    weights = tl.exp2(scores - safe[:, None])
    total = total * shrink + tl.sum(weights, 1)
    v = load_block(values, slot, written, d, D, BLOCK_D, PAGE, FP8, MASKED, q.dtype)
    if FP8:  # into the values, not the weights: those would fall below what fp16 holds
        v = (v.to(tl.float32) * tl.load(value_scales + slot + lane).to(tl.float32)[:, None]).to(q.dtype)
    mixed = tl.dot(weights.to(q.dtype), v, mixed * shrink[:, None])
    return new, total, mixed


@triton.jit
def rows_kernel(
    qkv,  # (rows, (H + 2 KVH) * D) fp16 or bf16, nothing rotated yet
    query_norm,  # (D,) float32; these two not read unless HAS_NORM
    key_norm,
    cosines,  # (context, D / 2) float32
    sines,
    keys,  # (pages, KVH, PAGE, D) as qkv, or uint8 where FP8
    values,
    key_scales,  # (pages, KVH, PAGE) float16; not touched unless FP8
    value_scales,
    positions,  # (rows,) int32; below 0: no token
    sequences,  # (rows,) int32: the row's line in `pages`
    pages,  # (sequences, stride) int32
    out,  # (rows, places) as qkv
    places_of,  # (H * D,) int32: where an element goes; not read unless HAS_ORDER
    sums,  # (rows, KVH, PARTS, G, D) float32
    tops,  # (rows, KVH, PARTS, G, 2) float32: maximum, sum
    arrived,  # (rows, KVH) int32 zeros, zeros again afterwards
    window,  # positions that a row sees, its own counted
    page_stride,
    places,
    SCALE: tl.constexpr,
    H: tl.constexpr,
    KVH: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,  # at least H / KVH and 16, a power of two
    PAGE: tl.constexpr,
    PARTS: tl.constexpr,
    LEAST: tl.constexpr,  # pages that a part takes at least
    EPSILON: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    FP8: tl.constexpr,
    WRITES: tl.constexpr,  # the row's own key and value are put into the cache here, else they are there
    PDL: tl.constexpr,
):
    """One program: the queries that share one key head, for one row, over one part of its text."""
    row, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    G: tl.constexpr = H // KVH
    if PDL:
        gdc_launch_dependents()
    position = tl.load(positions + row)
    first_seen = tl.maximum(position - window + 1, 0)
    first_page = first_seen // PAGE
    count = position // PAGE + 1 - first_page
    share = tl.maximum(tl.cdiv(count, PARTS), LEAST)
    parts = tl.cdiv(count, share)
    if (position < 0) | (part >= parts):
        if PDL:
            gdc_wait()
        return
    line = pages + tl.load(sequences + row) * page_stride
    begin = first_page + part * share
    end = tl.minimum(begin + share, first_page + count)
    g = tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    inside = (g < G)[:, None] & (d < D)[None, :]
    angle = position.to(tl.int64) * (D // 2)
    if PDL:
        gdc_wait()
    source = qkv + row.to(tl.int64) * ((H + 2 * KVH) * D)
    mine = source + (head * G + g)[:, None] * D
    q = rotated(mine, query_norm, cosines + angle, sines + angle, d, inside, D, EPSILON, HAS_NORM)
    q = q.to(qkv.dtype.element_ty)
    if WRITES:
        if part == parts - 1:
            page = tl.load(line + position // PAGE)
            slot = (page.to(tl.int64) * KVH + head) * PAGE + position % PAGE
            own = source + (H + head) * D
            one = (d < D)[None, :]
            key = rotated(own, key_norm, cosines + angle, sines + angle, d, one, D, EPSILON, HAS_NORM)
            store_vector(keys, key_scales, slot, key, d, D, FP8)
            value = tl.load(own + KVH * D + d[None, :], mask=one, other=0.0).to(tl.float32)
            store_vector(values, value_scales, slot, value, d, D, FP8)
            tl.debug_barrier()  # this program reads what it has written
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, BLOCK_D), tl.float32)
    low = tl.full((ROWS,), 0, tl.int32) + first_seen
    high = tl.full((ROWS,), 0, tl.int32) + position
    for number in tl.range(begin, end):
        page = tl.load(line + number)
        slot = (page.to(tl.int64) * KVH + head) * PAGE
        most, total, mixed = _absorb(
            q, most, total, mixed, slot, number * PAGE, low, high, keys, values, key_scales, value_scales, d,
            SCALE, D, BLOCK_D, PAGE, FP8, True,
        )  # fmt: skip
    if parts > 1:
        base = (row.to(tl.int64) * KVH + head) * PARTS
        at = sums + ((base + part) * G + g)[:, None] * D + d[None, :]
        tl.store(at, mixed, mask=inside)
        top = tops + ((base + part) * G + g) * 2
        tl.store(top, most, mask=g < G)
        tl.store(top + 1, total, mask=g < G)
        tl.debug_barrier()  # all of this program's sums are written before it reports
        if tl.atomic_add(arrived + row * KVH + head, 1, sem="acq_rel") != parts - 1:
            return
        tl.store(arrived + row * KVH + head, 0)
        most = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        mixed = tl.zeros((ROWS, BLOCK_D), tl.float32)
        for other in tl.range(0, parts):
            line_at = (base + other) * G + g
            top_other = tl.load(tops + line_at * 2, mask=g < G, other=0.0, cache_modifier=".cg")
            sum_other = tl.load(tops + line_at * 2 + 1, mask=g < G, other=1.0, cache_modifier=".cg")
            part_other = tl.load(
                sums + line_at[:, None] * D + d[None, :], mask=inside, other=0.0, cache_modifier=".cg"
            )
            new = tl.maximum(most, top_other)
            old_share, new_share = tl.exp2(most - new), tl.exp2(top_other - new)
            total = total * old_share + sum_other * new_share
            mixed = mixed * old_share[:, None] + part_other * new_share[:, None]
            most = new
    result = (mixed / total[:, None]).to(out.dtype.element_ty)
    place = (head * G + g)[:, None] * D + d[None, :]
    if HAS_ORDER:
        place = tl.load(places_of + place, mask=inside, other=0)
    tl.store(out + row.to(tl.int64) * places + place, result, mask=inside)


@triton.jit
def tile_kernel(
    qkv,  # (rows, (H + 2 KVH) * D) fp16 or bf16, nothing rotated yet
    query_norm,  # (D,) float32; not read unless HAS_NORM
    cosines,
    sines,
    keys,  # the rows' own keys and values are there already
    values,
    key_scales,
    value_scales,
    tiles,  # (tiles, 4) int32: first row, rows, position of the first row, line in `pages`
    pages,
    out,  # (rows, places) as qkv
    places_of,
    window,
    page_stride,
    places,
    SCALE: tl.constexpr,
    H: tl.constexpr,
    KVH: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,  # queries of one program: ROWS // (H / KVH) rows of the pass
    PAGE: tl.constexpr,
    EPSILON: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    FP8: tl.constexpr,
):
    """One program: the queries that share one key head, for one tile of rows, over all they see."""
    G: tl.constexpr = H // KVH
    tile, head = tiles + tl.program_id(0) * 4, tl.program_id(1)
    first_row, count = tl.load(tile), tl.load(tile + 1)
    start, line = tl.load(tile + 2), pages + tl.load(tile + 3) * page_stride
    query = tl.arange(0, ROWS)
    t, g = query // G, query % G
    d = tl.arange(0, BLOCK_D)
    inside = (t < count)[:, None] & (d < D)[None, :]
    row = (first_row + t).to(tl.int64)
    mine = qkv + row[:, None] * ((H + 2 * KVH) * D) + (head * G + g)[:, None] * D
    angle = (start + tl.minimum(t, count - 1)).to(tl.int64)[:, None] * (D // 2)
    q = rotated(mine, query_norm, cosines + angle, sines + angle, d, inside, D, EPSILON, HAS_NORM)
    q = q.to(qkv.dtype.element_ty)
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, BLOCK_D), tl.float32)
    high = start + tl.minimum(t, count - 1)
    low = tl.maximum(high - window + 1, 0)
    end = (start + count - 1) // PAGE + 1
    begin = 0
    edge = (start + 1) // PAGE  # pages before it are seen whole by every row
    if HAS_WINDOW:
        begin = tl.maximum(start - window + 1, 0) // PAGE
        edge = begin
    for number in tl.range(begin, edge):
        page = tl.load(line + number)
        slot = (page.to(tl.int64) * KVH + head) * PAGE
        most, total, mixed = _absorb(
            q, most, total, mixed, slot, number * PAGE, low, high, keys, values, key_scales, value_scales, d,
            SCALE, D, BLOCK_D, PAGE, FP8, False,
        )  # fmt: skip
    for number in tl.range(edge, end):
        page = tl.load(line + number)
        slot = (page.to(tl.int64) * KVH + head) * PAGE
        most, total, mixed = _absorb(
            q, most, total, mixed, slot, number * PAGE, low, high, keys, values, key_scales, value_scales, d,
            SCALE, D, BLOCK_D, PAGE, FP8, True,
        )  # fmt: skip
    result = (mixed / tl.maximum(total, 1e-30)[:, None]).to(out.dtype.element_ty)
    place = (head * G + g)[:, None] * D + d[None, :]
    if HAS_ORDER:
        place = tl.load(places_of + place, mask=inside, other=0)
    tl.store(out + row[:, None] * places + place, result, mask=inside)
