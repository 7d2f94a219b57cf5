"""Logits -> the next tokens, on the GPU, for a step that feeds itself: greedy, or temperature with top_k and top_p.

Thresholds are found by bisection, so nothing is sorted and whole ties stay in, as in runtime/sampling.py; the draw
walks the kept tokens in the order of their ids.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

DEPTH = tl.constexpr(-80.0)  # weights below exp of it are nothing
HALVINGS = tl.constexpr(30)


@triton.jit
def peaks_kernel(
    logits,  # (rows, V) float32
    tops,  # (rows, chunks) float32
    places,  # (rows, chunks) int32
    V,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: the highest logit of one chunk and where it is, the first where several are."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row, chunk = tl.program_id(0), tl.program_id(1)
    i = chunk * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row.to(tl.int64) * V + i, mask=i < V, other=float("-inf"))
    best = tl.max(x, 0)
    at = row * tl.num_programs(1) + chunk
    tl.store(tops + at, best)
    tl.store(places + at, tl.min(tl.where(x == best, i, V), 0))


@triton.jit
def _measure(held, line, best, sharpness, threshold, V, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """How many tokens are at least at the threshold, and the sum of their weights."""
    count = 0
    mass = 0.0
    if WHOLE:
        kept = held >= threshold
        count = tl.sum(kept.to(tl.int32), 0)
        mass = tl.sum(tl.where(kept, tl.exp(held), 0.0), 0)
    else:
        for first in tl.range(0, V, BLOCK):
            i = first + tl.arange(0, BLOCK)
            z = (tl.load(line + i, mask=i < V, other=float("-inf")) - best) * sharpness
            kept = z >= threshold
            count += tl.sum(kept.to(tl.int32), 0)
            mass += tl.sum(tl.where(kept, tl.exp(z), 0.0), 0)
    return count, mass


@triton.jit
def draw_kernel(
    logits,  # (rows, V) float32
    tops,  # (rows, chunks) float32
    places,  # (rows, chunks) int32
    sharpness,  # (rows,) float32: 1 / temperature; 0: greedy
    top_ks,  # (rows,) int32; V: off
    top_ps,  # (rows,) float32; 1: off
    uniforms,  # (RING, rows of the buffer) float32
    steps,  # (rows,) int32: how many tokens the row has drawn
    tokens,  # (rows,) int32: what the next step reads
    positions,  # (rows,) int32: moved on by one; below 0: not a row
    drawn,  # (RING, rows of the buffer) int32
    V,
    chunks,
    width,  # rows of the buffer
    RING: tl.constexpr,
    CHUNKS: tl.constexpr,  # a power of two, at least `chunks`
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,  # BLOCK holds the vocabulary: it is read once
    PDL: tl.constexpr,
):
    """One program draws one row's token and puts it where the next step finds it."""
    row = tl.program_id(0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    position = tl.load(positions + row)
    if position < 0:
        return
    c = tl.arange(0, CHUNKS)
    top = tl.load(tops + row * chunks + c, mask=c < chunks, other=float("-inf"))
    best = tl.max(top, 0)
    place = tl.load(places + row * chunks + c, mask=c < chunks, other=V)
    token = tl.min(tl.where(top == best, place, V), 0)
    sharp = tl.load(sharpness + row)
    step = tl.load(steps + row)
    if sharp > 0:
        line = logits + row.to(tl.int64) * V
        held = best
        if WHOLE:
            i = tl.arange(0, BLOCK)
            held = (tl.load(line + i, mask=i < V, other=float("-inf")) - best) * sharp
        wanted = tl.load(top_ks + row)
        low, high = DEPTH, 0.0
        if wanted < V:
            rounds = 0
            count = V
            while (rounds < HALVINGS) & (count != wanted):
                middle = (low + high) * 0.5
                count, _ = _measure(held, line, best, sharp, middle, V, BLOCK, WHOLE)
                low = tl.where(count >= wanted, middle, low)
                high = tl.where(count >= wanted, high, middle)
                rounds += 1
        count, mass = _measure(held, line, best, sharp, low, V, BLOCK, WHOLE)
        share = tl.load(top_ps + row)
        if share < 1:
            goal = share * mass
            high = 0.0
            for _ in range(HALVINGS):
                middle = (low + high) * 0.5
                count, part = _measure(held, line, best, sharp, middle, V, BLOCK, WHOLE)
                low = tl.where(part >= goal, middle, low)
                high = tl.where(part >= goal, high, middle)
            count, mass = _measure(held, line, best, sharp, low, V, BLOCK, WHOLE)
        target = tl.load(uniforms + (step % RING) * width + row) * mass
        before = 0.0
        found = 0
        last = 0
        for first in tl.range(0, V, BLOCK):
            i = first + tl.arange(0, BLOCK)
            z = (tl.load(line + i, mask=i < V, other=float("-inf")) - best) * sharp
            kept = z >= low
            weight = tl.where(kept, tl.exp(z), 0.0)
            reached = before + tl.cumsum(weight, 0)
            found += tl.sum(((reached <= target) & (i < V)).to(tl.int32), 0)
            last = tl.maximum(last, tl.max(tl.where(kept, i, 0), 0))
            before += tl.sum(weight, 0)
        token = tl.minimum(found, last)
    tl.store(tokens + row, token)
    tl.store(positions + row, position + 1)
    tl.store(steps + row, step + 1)
    tl.store(drawn + (step % RING) * width + row, token)
