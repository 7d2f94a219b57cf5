"""The kernel for many rows of x on Hopper: weights are dequantised into shared memory, a tile for many rows of x.

`wgmma` works through one tile while the next is made, so that making them costs little where a tile serves a
hundred rows and more. Weights are rounded to x's dtype, each once, as in a dense copy. Where few programs would run
K is split: every part writes its sums, the one that comes last adds them in a fixed order. 4 bits, compute
capability 9.0. Knows no tuning.
"""

# ruff: noqa: RUF005 - what ruff would rather see is no Triton
# mypy: disable-error-code="assignment, var-annotated"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantmill.kernels.triton.expand import by_register, columns_of, pairs_at, plane_of

# Triton 3.9 gave both new names and took the old ones away.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
load_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.jit
def _half(
    w, scale, zero, HALF: gl.constexpr, HAS_ZERO: gl.constexpr, BF16: gl.constexpr, WARPS: gl.constexpr
):
    """Half of a unit of WARPS tiles -> (rows, 32)."""
    first = plane_of(w, w, w, scale, zero, 2 * HALF, 4, HAS_ZERO, BF16, WARPS)
    second = plane_of(w, w, w, scale, zero, 2 * HALF + 1, 4, HAS_ZERO, BF16, WARPS)
    return columns_of(first, second, WARPS, False)


@gluon.jit(do_not_specialize=["M"])
def wide_kernel(
    x,  # (M, K) fp16 or bf16, rows `stride` apart
    words,  # (tiles, UNITS, 1, 32, 8) int16
    scales,  # (tiles, groups, 8, 2) int16: float16
    zeros,  # the same; not read unless HAS_ZERO
    bias,  # (N,) float16; not read unless HAS_BIAS
    y,  # (M, N) as x
    sums,  # (programs, rows, BT) float32; not touched where PARTS is 1
    arrived,  # (programs / PARTS,) int32 zeros, zeros again afterwards
    M,
    N,
    stride,
    UNITS: gl.constexpr,
    GROUP_PLANES: gl.constexpr,  # 2, or a multiple of 4
    HAS_ZERO: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    BF16: gl.constexpr,
    PARTS: gl.constexpr,
    WARPS: gl.constexpr,
    BT: gl.constexpr,
    REPS: gl.constexpr,  # tiles of every warp
    AHEAD: gl.constexpr,  # units asked for before they are needed; divides the units of a part
    STAGES: gl.constexpr,  # blocks of x in shared memory
    PDL: gl.constexpr,
):
    """One program: 16 * WARPS * REPS rows of weights times BT rows of x over one part of K."""
    T: gl.constexpr = WARPS * 32
    ROWS: gl.constexpr = WARPS * 16 * REPS
    KIND: gl.constexpr = gl.bfloat16 if BF16 else gl.float16
    GROUPS: gl.constexpr = (UNITS * 4 + GROUP_PLANES - 1) // GROUP_PLANES
    GROUP: gl.constexpr = GROUP_PLANES // 4
    LENGTH: gl.constexpr = UNITS // PARTS
    P: gl.constexpr = gl.BlockedLayout([1, 8], [32, 1], [WARPS, 1], [1, 0])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BT, 16])
    X: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    part = gl.program_id(0) % PARTS
    turn = gl.program_id(0) // PARTS
    blocks_of_x = gl.cdiv(M, BT)
    block, first_row = turn // blocks_of_x, turn % blocks_of_x * BT
    first = part * LENGTH
    tid = gl.arange(0, T, gl.SliceLayout(1, P))
    tile = block * (WARPS * REPS) + (tid >> 5)
    at = words + ((tile * UNITS + first).to(gl.int64) * 256 + (tid & 31) * 8)[:, None]
    at = at + gl.arange(0, 8, gl.SliceLayout(0, P))[None, :]
    scales_at = pairs_at(scales, block * (WARPS * REPS), GROUPS, WARPS)
    zeros_at = pairs_at(zeros, block * (WARPS * REPS), GROUPS, WARPS)
    if PDL:
        gdc_launch_dependents()
    ring = ()
    for i in gl.static_range(AHEAD):
        for r in gl.static_range(REPS):
            ring = ring + (gl.load(at + (r * WARPS * UNITS + i) * 256, eviction_policy="evict_first"),)
    if PDL:
        gdc_wait()
    m = gl.minimum(first_row + gl.arange(0, BT, gl.SliceLayout(1, X)), M - 1)
    x_at = x + (m * stride + first * 64)[:, None] + gl.arange(0, 64, gl.SliceLayout(0, X))[None, :]
    LINES: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    held = gl.allocate_shared_memory(KIND, [STAGES, BT, 64], LINES)
    made = gl.allocate_shared_memory(KIND, [3, ROWS, 64], LINES)
    for i in gl.static_range(STAGES - 2):
        load_async(held.index(i), x_at + i * 64)
        async_copy.commit_group()
    acc = gl.zeros([ROWS, BT], gl.float32, ACC)
    for start in range(0, LENGTH, AHEAD):
        rest = ring
        ring = ()
        for i in gl.static_range(AHEAD):
            unit = start + i
            tiles = made.index(unit % 3)
            for r in gl.static_range(REPS):
                group = r * (WARPS * GROUPS) + (first + unit) * 4 // GROUP_PLANES
                scale = by_register(scales_at, group, WARPS, P)
                zero = scale
                if HAS_ZERO:
                    zero = by_register(zeros_at, group, WARPS, P)
                w = rest[i * REPS + r]
                left = _half(w, scale, zero, 0, HAS_ZERO, BF16, WARPS)
                if GROUP == 0:
                    scale = by_register(scales_at, r * (WARPS * GROUPS) + (first + unit) * 2 + 1, WARPS, P)
                    if HAS_ZERO:
                        zero = by_register(zeros_at, r * (WARPS * GROUPS) + (first + unit) * 2 + 1, WARPS, P)
                right = _half(w, scale, zero, 1, HAS_ZERO, BF16, WARPS)
                both = gl.reshape(gl.permute(gl.join(left, right), [0, 2, 1]), [WARPS * 16, 64])
                tiles.slice(r * WARPS * 16, WARPS * 16, 0).store(both)
                to = at + (gl.minimum(unit + AHEAD, LENGTH - 1) + r * WARPS * UNITS) * 256
                ring = ring + (gl.load(to, eviction_policy="evict_first"),)
            async_copy.wait_group(STAGES - 3)
            fence_async_shared()
            barrier()
            acc = warpgroup_mma(tiles, held.index(unit % STAGES).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])
            # all warps are behind the barrier, so what was read two units ago may be written over
            ahead = gl.minimum(unit + STAGES - 2, LENGTH - 1)
            load_async(held.index((unit + STAGES - 2) % STAGES), x_at + ahead * 64)
            async_copy.commit_group()
    out = warpgroup_mma_wait(0, deps=[acc])
    async_copy.wait_group(0)
    if PARTS > 1:
        row = gl.arange(0, ROWS, gl.SliceLayout(1, ACC))[:, None] * BT
        to = sums + turn.to(gl.int64) * (PARTS * ROWS * BT) + row
        to = to + gl.arange(0, BT, gl.SliceLayout(0, ACC))[None, :]
        gl.store(to + part * (ROWS * BT), out)
        barrier()  # all of this program's sums are written before it reports
        if gl.atomic_add(arrived + turn, 1, sem="acq_rel") != PARTS - 1:
            return
        barrier()
        out = gl.load(to, cache_modifier=".cg")
        for q in gl.static_range(1, PARTS):
            out += gl.load(to + q * (ROWS * BT), cache_modifier=".cg")
        gl.store(arrived + turn, 0)
    if HAS_BIAS:
        n = block * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, ACC))
        out += gl.load(bias + n, mask=n < N, other=0.0).to(gl.float32)[:, None]
    BY_ROW: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16] if WARPS >= 8 else [4, 8], [WARPS, 1], [1, 0])
    final = gl.convert_layout(gl.permute(out.to(KIND), (1, 0)), BY_ROW)
    mm = first_row + gl.arange(0, BT, gl.SliceLayout(1, BY_ROW))
    nn = block * ROWS + gl.arange(0, ROWS, gl.SliceLayout(0, BY_ROW))
    mask = (mm < M)[:, None] & (nn < N)[None, :]
    gl.store(y + mm.to(gl.int64)[:, None] * N + nn[None, :], final, mask=mask)
