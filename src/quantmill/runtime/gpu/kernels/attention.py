"""Attention over pages: `rows_kernel` for single rows (decoding), `tile_kernel` for many rows of one sequence.

Both keep running maxima and sums (Milakov & Gimelshein, arXiv 1805.02867) as FlashAttention does; the first also
cuts long texts into parts, as flash decoding does. The part that comes last adds the parts in their order; or
(POSTED) every word of a part carries the launch's number, and some parts read until all words have it: no fence.
How a row is cut depends on its position alone, so its bits do not depend on what else is in the pass.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantmill.runtime.gpu.kernels.rotary import (
    as_stored,
    load_block,
    prefetch_ahead,
    prefetch_block,
    rotated,
    store_vectors,
    turns,
)

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
def _put(out, result, row, heads, here, d, places, places_of, D: tl.constexpr, HAS_ORDER: tl.constexpr):
    """Results (heads, D) of one row to where the next linear reads them."""
    place = heads[:, None] * D + d[None, :]
    mask = here[:, None] & (d < D)[None, :]
    if HAS_ORDER:
        place = tl.load(places_of + place, mask=mask, other=0)
    tl.store(out + row.to(tl.int64) * places + place, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _block(line, first, head, d, low, high, KVH: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr):
    """Where the BLOCK positions from `first` on lie, (BLOCK,) slots, and which of them are in [low, high)."""
    at = first + tl.arange(0, BLOCK)
    seen = (at >= low) & (at < high)
    page = tl.load(line + at // PAGE, mask=seen, other=0)
    return (page.to(tl.int64) * KVH + head) * PAGE + at % PAGE, seen


@triton.jit
def _fetched(cache, scales, slot, seen, d, D: tl.constexpr, BLOCK_D: tl.constexpr, FP8: tl.constexpr):
    """Keys or values (BLOCK, BLOCK_D) as they are stored, and their scales; 0 where nothing is seen."""
    mask = seen[:, None]
    if BLOCK_D != D:
        mask = mask & (d < D)[None, :]
    found = tl.load(cache + slot[:, None] * D + d[None, :], mask=mask, other=0)
    scale = tl.load(scales + slot, mask=seen, other=0.0) if FP8 else slot
    return found, scale


@triton.jit
def _taken(q, most, total, mixed, keys, key_scales, values, value_scales, seen, SCALE, FP8: tl.constexpr):
    """A block of keys and values into the running sums."""
    if FP8:
        keys = keys.to(tl.float8e4nv, bitcast=True).to(q.dtype)
    scores = tl.dot(q, tl.trans(keys)) * (SCALE * LOG2E)
    if FP8:
        scores *= key_scales.to(tl.float32)[None, :]
    scores = tl.where(seen[None, :], scores, float("-inf"))
    new = tl.maximum(most, tl.max(scores, 1))
    safe = tl.where(new == float("-inf"), 0.0, new)
    shrink = tl.exp2(most - safe)
    weights = tl.exp2(scores - safe[:, None])
    total = total * shrink + tl.sum(weights, 1)
    if FP8:  # into the values, not the weights: those would fall below what fp16 holds
        values = values.to(tl.float8e4nv, bitcast=True).to(tl.float32) * value_scales.to(tl.float32)[:, None]
        values = values.to(q.dtype)
    mixed = tl.dot(weights.to(q.dtype), values, mixed * shrink[:, None])
    return new, total, mixed


@triton.jit
def _numbered(value, number):
    """float32 and the number of the launch in one word, which is written and read at once."""
    return (value.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF) | (number.to(tl.int64) << 32)


@triton.constexpr_function
def _awaiting(pack):
    """PTX that reads until `pack` elements are there: $0 ... the sums' words, their maxima, their totals.

    Every thread reads for itself until its own words are there, so that nothing is decided by another's.
    """
    words, out, inputs = range(3 * pack), 3 * pack, [f"w{i}" for i in range(3 * pack)]
    numbers = out + 2 * pack  # the first operand that holds the launch's number
    where = [f"[${out + i}]" for i in range(pack)] + [f"[${out + pack + i}]" for i in range(pack)]
    where += [f"[${out + pack + i} + 8]" for i in range(pack)]
    loads = "".join(f"ld.relaxed.gpu.global.b64 {w}, {at}; " for w, at in zip(inputs, where, strict=True))
    checks = "".join(
        f"mov.b64 {{l{i}, h}}, w{i}; xor.b32 h, h, ${numbers}; or.b32 late, late, h; " for i in words
    )
    return (
        "{ .reg .pred again; .reg .b32 h, late; "
        + "".join(f".reg .b64 w{i}; .reg .b32 l{i}; " for i in words)
        + f"WAIT: {loads} mov.b32 late, 0; {checks} setp.ne.b32 again, late, 0; @again bra WAIT; "
        + "".join(f"mov.b32 ${i}, l{i}; " for i in words)
        + "}"
    )


@triton.constexpr_function
def _operands(pack):
    """Of `_awaiting`: three results, two addresses and a number for each element."""
    return ",".join(["=r"] * (3 * pack) + ["l"] * (2 * pack) + ["r"] * pack)


@triton.jit
def _slice(
    out, sums, tops, base, row, head, part, parts, number, places, places_of,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, SLICES: tl.constexpr,
    PACK: tl.constexpr, HAS_ORDER: tl.constexpr,
):  # fmt: skip
    """The first SLICES parts wait for all, 2 * SLICES at most, and each adds up and puts some columns."""
    if part < SLICES:
        WIDTH: tl.constexpr = BLOCK_D // SLICES
        p, few = tl.arange(0, 2 * SLICES), tl.arange(0, GROUP)
        columns = part * WIDTH + tl.arange(0, WIDTH)
        # What is not there is read from where something is, and weighs nothing.
        lines = (base + tl.minimum(p, parts - 1))[:, None] * G + tl.minimum(few, G - 1)[None, :]
        sums_at = sums + lines[:, :, None] * D + tl.minimum(columns, D - 1)[None, None, :]
        tops_at = tops + lines[:, :, None] * 2 + columns[None, None, :] * 0
        wanted = number + (sums_at.to(tl.int64) * 0).to(tl.int32)
        word, top, total = tl.inline_asm_elementwise(
            _awaiting(PACK), _operands(PACK), [sums_at, tops_at, wanted],
            dtype=(tl.int32, tl.int32, tl.int32), is_pure=False, pack=PACK,
        )  # fmt: skip
        there = (p < parts)[:, None, None]
        top = tl.where(there, top.to(tl.float32, bitcast=True), float("-inf"))
        merged = _merged(word.to(tl.float32, bitcast=True), top, total.to(tl.float32, bitcast=True))
        _put(out, merged, row, head * G + few, few < G, columns, places, places_of, D, HAS_ORDER)


@triton.jit
def _merged(part_of, top_of, sum_of):
    """(parts, heads, columns), maxima and totals likewise or broadcast -> (heads, columns), in the parts' order."""
    highest = tl.max(top_of, 0)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    share_of = tl.exp2(top_of - highest[None, :, :])
    every = tl.maximum(tl.sum(sum_of * share_of, 0), 1e-30)
    return tl.sum(part_of * share_of, 0) / every


@triton.jit
def _summed(
    sums, tops, base, parts, d,
    G: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """All parts, which have reported, at once: one wait for memory. Those that are not there weigh nothing."""
    p, few = tl.arange(0, PARTS), tl.arange(0, GROUP)
    there = (p < parts)[:, None] & (few < G)[None, :]
    lines = (base + p)[:, None] * G + few[None, :]
    kept = there[:, :, None] & (d < D)[None, None, :]
    top_of = tl.load(tops + lines * 2, mask=there, other=float("-inf"), cache_modifier=".cg")
    sum_of = tl.load(tops + lines * 2 + 1, mask=there, other=0.0, cache_modifier=".cg")
    part_of = tl.load(
        sums + lines[:, :, None] * D + d[None, None, :], mask=kept, other=0.0, cache_modifier=".cg"
    )
    return _merged(part_of, top_of[:, :, None], sum_of[:, :, None])


@triton.jit(do_not_specialize=["least"])
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
    next_keys,  # the next layer's, of the same pages; not touched unless NEXT
    next_values,
    sums,  # (rows, KVH, parts, G, D) float32; POSTED: int64, a float32 and the number of a launch in each
    tops,  # (rows, KVH, parts, G, 2), likewise: maximum, sum
    turns_of,  # (rows, KVH) int32: POSTED: the number of the last launch in which this row had several parts;
    # else how many parts have come, zeros again afterwards
    window,  # positions that a row sees, its own counted
    page_stride,
    places,
    least,  # blocks that a part takes at least
    SCALE: tl.constexpr,
    H: tl.constexpr,
    KVH: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,  # at least H / KVH and 16, a power of two
    GROUP: tl.constexpr,  # at least H / KVH, a power of two
    PARTS: tl.constexpr,  # into which a row's text is cut at most, a power of two
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,  # positions that are taken at once, some pages
    EPSILON: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    FP8: tl.constexpr,
    POSTED: tl.constexpr,  # the first parts wait for all parts' words, else who comes last adds up
    PACK: tl.constexpr,  # POSTED: elements that a thread waits for at once
    WRITES: tl.constexpr,  # the row's own key and value are put into the cache here, else somebody has
    AHEAD: tl.constexpr,  # blocks asked for before they are needed, where PDL
    NEXT: tl.constexpr,  # the next layer's keys and values are asked for, too, a block of each part
    PDL: tl.constexpr,
):
    """One program: the queries that share one key head, for one row, over one part of its text.

    The row's own key and value come from `qkv`; all before it from the cache, where earlier steps have put them,
    so that the first block is read while the kernel before this one still runs.
    """
    # A row's parts are started side by side: those that wait for one another all run.
    part, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    G: tl.constexpr = H // KVH
    PER: tl.constexpr = BLOCK // PAGE
    if PDL:
        gdc_launch_dependents()
    position = tl.load(positions + row)
    first_seen = tl.maximum(position - window + 1, 0)
    first_page = first_seen // PAGE
    count = tl.cdiv(position // PAGE + 1 - first_page, PER)  # blocks
    share = tl.maximum(tl.cdiv(count, PARTS), least)
    parts = tl.cdiv(count, share)
    if (position < 0) | (part >= parts):
        if PDL:  # noqa: SIM102  # the first is decided when it is compiled
            if part == 0:  # who is done before the kernel before it must not be all of this launch
                gdc_wait()
        return
    line = pages + tl.load(sequences + row) * page_stride
    begin = first_page * PAGE + part * share * BLOCK  # positions
    end = tl.minimum(begin + share * BLOCK, position)
    last = part == parts - 1
    g = tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    inside = (g < G)[:, None] & (d < D)[None, :]
    one = (d < D)[None, :]
    cosine, sine = turns(cosines, position, d, D), turns(sines, position, d, D)
    slot, seen = _block(line, begin, head, d, first_seen, end, KVH, PAGE, BLOCK)
    newest = tl.load(line + position // PAGE).to(tl.int64)
    EARLY: tl.constexpr = WRITES and PDL
    if EARLY:
        k, k_scale = _fetched(keys, key_scales, slot, seen, d, D, BLOCK_D, FP8)
        v, v_scale = _fetched(values, value_scales, slot, seen, d, D, BLOCK_D, FP8)
    if PDL:
        if BLOCK_D == D:
            second = begin // PAGE + PER
            for later in tl.range(second, tl.minimum(tl.cdiv(end, PAGE), second + AHEAD * PER)):
                ahead = (tl.load(line + later).to(tl.int64) * KVH + head) * PAGE
                prefetch_block(keys, ahead, D, PAGE)
                prefetch_block(values, ahead, D, PAGE)
        if NEXT:
            for page in tl.range(begin // PAGE, tl.minimum(tl.cdiv(end, PAGE), begin // PAGE + PER)):
                ahead = (tl.load(line + page).to(tl.int64) * KVH + head) * PAGE
                prefetch_ahead(next_keys, ahead, D, PAGE)
                prefetch_ahead(next_values, ahead, D, PAGE)
        gdc_wait()
    number = tl.load(turns_of + row * KVH + head) + 1 if POSTED else position * 0
    source = qkv + row.to(tl.int64) * ((H + 2 * KVH) * D)
    mine = source + (head * G + g)[:, None] * D
    q = rotated(mine, query_norm, cosine, sine, d, inside, D, EPSILON, HAS_NORM)
    own = source + (H + head) * D
    key = rotated(own, key_norm, cosine, sine, d, one, D, EPSILON, HAS_NORM)
    value = tl.load(own + KVH * D + d[None, :], mask=one, other=0.0).to(tl.float32)
    q = q.to(qkv.dtype.element_ty)
    if WRITES:
        slot_here = (newest * KVH + head) * PAGE + position % PAGE
        mine_to_write = (tl.zeros((1, 1), tl.int32) + part) == parts - 1
        store_vectors(keys, key_scales, slot_here, key, mine_to_write, d, D, FP8)
        store_vectors(values, value_scales, slot_here, value, mine_to_write, d, D, FP8)
    if not EARLY:
        k, k_scale = _fetched(keys, key_scales, slot, seen, d, D, BLOCK_D, FP8)
        v, v_scale = _fetched(values, value_scales, slot, seen, d, D, BLOCK_D, FP8)
    # The last part begins with the row itself.
    key, value = as_stored(key, q.dtype, FP8), as_stored(value, q.dtype, FP8)
    score = tl.sum(q.to(tl.float32) * key, 1) * (SCALE * LOG2E)
    most = tl.where(last, score, float("-inf"))
    total = tl.where(last, 1.0, 0.0) + tl.zeros((ROWS,), tl.float32)
    mixed = tl.where(last, value, 0.0) + tl.zeros((ROWS, BLOCK_D), tl.float32)
    most, total, mixed = _taken(q, most, total, mixed, k, k_scale, v, v_scale, seen, SCALE, FP8)
    for first in tl.range(begin + BLOCK, end, BLOCK, num_stages=1):
        slot, seen = _block(line, first, head, d, first_seen, end, KVH, PAGE, BLOCK)
        k, k_scale = _fetched(keys, key_scales, slot, seen, d, D, BLOCK_D, FP8)
        v, v_scale = _fetched(values, value_scales, slot, seen, d, D, BLOCK_D, FP8)
        if PDL:  # noqa: SIM102
            if BLOCK_D == D:
                for which in tl.static_range(PER):
                    later = first // PAGE + AHEAD * PER + which
                    if later * PAGE < end:
                        ahead = (tl.load(line + later).to(tl.int64) * KVH + head) * PAGE
                        prefetch_block(keys, ahead, D, PAGE)
                        prefetch_block(values, ahead, D, PAGE)
        most, total, mixed = _taken(q, most, total, mixed, k, k_scale, v, v_scale, seen, SCALE, FP8)
    if parts > 1:
        base = (row.to(tl.int64) * KVH + head) * PARTS
        at = (base + part) * G + g
        to, top = sums + at[:, None] * D + d[None, :], tops + at * 2
        if POSTED:
            tl.store(to, _numbered(mixed, number), mask=inside)
            tl.store(top, _numbered(most, number), mask=g < G)
            tl.store(top + 1, _numbered(total, number), mask=g < G)
            if parts < 4:
                _slice(
                    out, sums, tops, base, row, head, part, parts, number, places, places_of,
                    G, D, BLOCK_D, GROUP, 2, PACK, HAS_ORDER,
                )  # fmt: skip
            elif parts < 8:
                _slice(
                    out, sums, tops, base, row, head, part, parts, number, places, places_of,
                    G, D, BLOCK_D, GROUP, 4, PACK, HAS_ORDER,
                )  # fmt: skip
            else:
                _slice(
                    out, sums, tops, base, row, head, part, parts, number, places, places_of,
                    G, D, BLOCK_D, GROUP, PARTS // 2, PACK, HAS_ORDER,
                )  # fmt: skip
            if part == 0:  # it has seen all parts' words: all have read the number
                tl.store(turns_of + row * KVH + head, number)
        else:
            tl.store(to, mixed, mask=inside)
            tl.store(top, most, mask=g < G)
            tl.store(top + 1, total, mask=g < G)
            tl.debug_barrier()  # all of this program's sums are written before it reports
            if tl.atomic_add(turns_of + row * KVH + head, 1, sem="acq_rel") != parts - 1:
                return
            tl.store(turns_of + row * KVH + head, 0)
            merged = _summed(sums, tops, base, parts, d, G, D, GROUP, PARTS)
            few = tl.arange(0, GROUP)
            _put(out, merged, row, head * G + few, few < G, d, places, places_of, D, HAS_ORDER)
    else:
        _put(out, mixed / total[:, None], row, head * G + g, g < G, d, places, places_of, D, HAS_ORDER)


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
    at = start + tl.maximum(tl.minimum(t, count - 1), 0)  # a tile of no rows is filler
    cosine, sine = turns(cosines, at[:, None], d, D), turns(sines, at[:, None], d, D)
    q = rotated(mine, query_norm, cosine, sine, d, inside, D, EPSILON, HAS_NORM)
    q = q.to(qkv.dtype.element_ty)
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, BLOCK_D), tl.float32)
    high = at
    low = tl.maximum(high - window + 1, 0)
    end = (start + count - 1) // PAGE + 1
    begin = 0
    edge = (start + 1) // PAGE  # pages before it are seen whole by every row
    if HAS_WINDOW:
        begin = tl.maximum(start - window + 1, 0) // PAGE
        edge = begin
    page = tl.load(line + begin)  # one ahead of its use, so that no address waits for it
    for number in tl.range(begin, edge):
        slot = (page.to(tl.int64) * KVH + head) * PAGE
        page = tl.load(line + number + 1, mask=number + 1 < end, other=0)
        most, total, mixed = _absorb(
            q, most, total, mixed, slot, number * PAGE, low, high, keys, values, key_scales, value_scales, d,
            SCALE, D, BLOCK_D, PAGE, FP8, False,
        )  # fmt: skip
    for number in tl.range(edge, end):
        slot = (page.to(tl.int64) * KVH + head) * PAGE
        page = tl.load(line + number + 1, mask=number + 1 < end, other=0)
        most, total, mixed = _absorb(
            q, most, total, mixed, slot, number * PAGE, low, high, keys, values, key_scales, value_scales, d,
            SCALE, D, BLOCK_D, PAGE, FP8, True,
        )  # fmt: skip
    result = (mixed / tl.maximum(total, 1e-30)[:, None]).to(out.dtype.element_ty)
    place = (head * G + g)[:, None] * D + d[None, :]
    if HAS_ORDER:
        place = tl.load(places_of + place, mask=inside, other=0)
    tl.store(out + row[:, None] * places + place, result, mask=inside)
