"""A kernel that only reads: the ceiling that every other one is compared with."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def read_kernel(
    source,  # (n,) int32
    before,  # (4096,) int32: what the kernel before this one wrote
    sink,  # (4096,) int32
    n,
    BLOCK: tl.constexpr,
    ROUNDS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program reads BLOCK * ROUNDS words, with PDL before it waits for the kernel before it."""
    if PDL:
        gdc_launch_dependents()
    at = tl.program_id(0).to(tl.int64) * BLOCK * ROUNDS + tl.arange(0, BLOCK)
    seen = tl.load(source + at, mask=at < n, other=0, eviction_policy="evict_first")
    for i in tl.static_range(1, ROUNDS):
        more = at + i * BLOCK
        seen ^= tl.load(source + more, mask=more < n, other=0, eviction_policy="evict_first")
    total = tl.sum(seen, 0)
    if PDL:
        gdc_wait()
    other = tl.sum(tl.load(before + tl.arange(0, 4096)), 0)
    tl.store(sink + tl.program_id(0) % 4096, (total + other) & 1023)
