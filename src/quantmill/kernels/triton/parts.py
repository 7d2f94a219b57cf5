"""The kernel for many rows of x in its simple form: a program takes one part of K of one tile, and is done.

The faster form where a program takes all of K: results leave by plain stores and nothing stays in shared memory for
them. Where K is split wide.py's is faster: here sums are kept in rows, 8 bytes a thread. It also stands in for
wide.py's where that one is wrong or does not compile. Columns are summed in their order: a row of x has the same
bits whatever rows come with it, and in blocks of any size, as long as PARTS is the same. Compute capability 9.0.
Knows no tuning.
"""

# ruff: noqa: RUF005 - what ruff would rather see is no Triton
# mypy: disable-error-code="assignment, var-annotated"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantmill.kernels.triton.codes import planes, words_in
from quantmill.kernels.triton.fragments import fields
from quantmill.kernels.triton.wide import (
    _operand,
    _pairs,
    _plane,
    _spread,
    _turned,
    _words,
    asked,
    barrier,
    load_tile,
    pair_of_step,
    plane_of_step,
    unit_of_step,
    units_at_once,
)


@gluon.jit(do_not_specialize=["M", "PARTS"])
def parts_kernel(
    x,  # descriptor of (M, K) fp16 or bf16 in blocks of (BT, 64)
    words,  # (tiles, UNITS, WORDS, 32, 8) int16
    scales,  # (tiles, groups, 8, 2) int16: float16
    zeros,  # the same; not read unless HAS_ZERO
    bias,  # (N,) float16; not read unless HAS_BIAS
    y,  # (M, N) as x
    sums,  # (programs, rows, BT) float32; not touched unless SPLIT
    arrived,  # (programs / PARTS,) int32 zeros, zeros again afterwards; likewise
    M,
    N,
    PARTS,  # of K
    UNITS: gl.constexpr,
    BITS: gl.constexpr,
    GROUP_PLANES: gl.constexpr,  # planes that share a scale: an even number
    HAS_ZERO: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    BF16: gl.constexpr,
    SPLIT: gl.constexpr,  # PARTS is more than 1
    WARPS: gl.constexpr,
    BT: gl.constexpr,
    REPS: gl.constexpr,  # tiles of every warp
    AHEAD: gl.constexpr,  # units of a turn, asked for a turn before they are needed
    STAGES: gl.constexpr,  # blocks of x in shared memory; divides a turn's
    PIECES: gl.constexpr,  # of a block's 64 columns, multiplied one after the other: 1, 2 or 4
    OPEN: gl.constexpr,  # products that may be unfinished while the next weights are made; at most PIECES * REPS
    PDL: gl.constexpr,
):
    """One program: 16 * WARPS * REPS rows of weights times BT rows of x over one part of K."""
    T: gl.constexpr = WARPS * 32
    ROWS: gl.constexpr = WARPS * 16 * REPS
    KIND: gl.constexpr = gl.bfloat16 if BF16 else gl.float16
    PLANES: gl.constexpr = planes(BITS)
    WORDS: gl.constexpr = words_in(BITS)
    UNIT: gl.constexpr = PLANES * 16  # columns
    TOGETHER: gl.constexpr = units_at_once(PLANES)
    STEPS: gl.constexpr = AHEAD * PLANES // 4  # of 64 columns, in a turn
    gl.static_assert(STEPS % STAGES == 0)
    gl.static_assert(OPEN <= PIECES * REPS)
    GROUPS: gl.constexpr = (UNITS * PLANES + GROUP_PLANES - 1) // GROUP_PLANES
    SCALES: gl.constexpr = (PLANES + GROUP_PLANES - 1) // GROUP_PLANES  # of a unit
    TURNS: gl.constexpr = (UNITS + AHEAD - 1) // AHEAD  # of all of K, AHEAD units each
    P: gl.constexpr = gl.BlockedLayout([1, 8], [32, 1], [WARPS, 1], [1, 0])
    B4: gl.constexpr = gl.BlockedLayout([1, 2, 2, 2], [32, 1, 1, 1], [WARPS, 1, 1, 1], [3, 2, 1, 0])
    S: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, B4))
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BT, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    part = gl.program_id(0) % PARTS
    turn = gl.program_id(0) // PARTS
    blocks_of_x = gl.cdiv(M, BT)
    block, first_row = turn // blocks_of_x, turn % blocks_of_x * BT
    first = part * TURNS // PARTS * AHEAD
    last = (part + 1) * TURNS // PARTS * AHEAD
    tid = gl.arange(0, T, gl.SliceLayout(1, P))
    lane = tid & 31
    tile = block * (WARPS * REPS) + (tid >> 5)
    at = words + ((tile * UNITS).to(gl.int64) * (WORDS * 256) + lane * 8)[:, None]
    at = at + gl.arange(0, 8, gl.SliceLayout(0, P))[None, :]
    none = gl.zeros([T, 8], gl.int16, P)
    odd = (0 - (lane & 1)).to(gl.int16)[:, None] + none
    upper = (0 - (lane >> 1 & 1)).to(gl.int16)[:, None] + none
    stay = gl.where((lane & 2) == 0, fields(BITS, False), fields(BITS, True)).to(gl.int16)[:, None] + none
    by = gl.where((lane & 2) == 0, BITS, 32 - BITS).to(gl.int16)[:, None] + none
    stid = gl.arange(0, T, gl.SliceLayout(1, S))
    pair_at = (block * (WARPS * REPS) + (stid >> 5)).to(gl.int64) * (GROUPS * 16) + ((stid & 31) >> 2) * 2
    pair_at = pair_at[:, None] + gl.arange(0, 2, gl.SliceLayout(0, S))[None, :]
    if PDL:
        gdc_launch_dependents()
    LINES: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    held, full = (), ()
    for s in gl.static_range(STAGES):  # of their own each, so that no barrier is put between uses of two
        held = held + (gl.allocate_shared_memory(KIND, [BT, 64], LINES),)
        full = full + (gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()),)
        mbarrier.init(full[s], count=1)
    ring, scale_ring, zero_ring = (), (), ()
    for i in gl.static_range(AHEAD // TOGETHER):
        for r in gl.static_range(REPS):
            for u in gl.static_range(TOGETHER):
                unit = gl.minimum(first + i * TOGETHER + u, UNITS - 1)
                ring = ring + (_words(at + (unit + r * WARPS * UNITS) * (WORDS * 256), WORDS),)
                group = unit * PLANES // GROUP_PLANES + r * WARPS * GROUPS
                scale_ring = scale_ring + _pairs(scales + pair_at, group, SCALES)
                if HAS_ZERO:
                    zero_ring = zero_ring + _pairs(zeros + pair_at, group, SCALES)
    fence_async_shared()
    barrier()
    if PDL:
        gdc_wait()
    for s in gl.static_range(STAGES - 1):
        mbarrier.expect(full[s], BT * 128)
        load_tile(x, [first_row, first * UNIT + s * 64], full[s], held[s])
    acc = ()
    for _ in gl.static_range(REPS):
        acc = acc + (gl.zeros([WARPS * 16, BT], gl.float32, ACC),)
    phase = 0
    for start in range(first, last, AHEAD):
        words_here, scales_here, zeros_here = ring, scale_ring, zero_ring
        ring, scale_ring, zero_ring = (), (), ()
        turned = words_here[:REPS]
        for j in gl.static_range(STEPS):
            for r in gl.static_range(REPS):
                for h in gl.static_range(PIECES):
                    found = ()
                    for q in gl.static_range(h * 4 // PIECES, (h + 1) * 4 // PIECES):
                        if plane_of_step(j, q, PLANES) == 0:
                            w = words_here[asked(unit_of_step(j, q, PLANES), r, PLANES, REPS)]
                            w = _turned(w, odd, stay, by, upper, BITS)
                            turned = turned[:r] + (w,) + turned[r + 1 :]
                            unit = gl.minimum(start + AHEAD + unit_of_step(j, q, PLANES), UNITS - 1)
                            ring = ring + (_words(at + (unit + r * WARPS * UNITS) * (WORDS * 256), WORDS),)
                            group = unit * PLANES // GROUP_PLANES + r * WARPS * GROUPS
                            scale_ring = scale_ring + _pairs(scales + pair_at, group, SCALES)
                            if HAS_ZERO:
                                zero_ring = zero_ring + _pairs(zeros + pair_at, group, SCALES)
                        scale = scales_here[pair_of_step(j, q, r, PLANES, GROUP_PLANES, REPS)]
                        scale = _spread(scale, WARPS, P)
                        zero = scale
                        if HAS_ZERO:
                            zero = zeros_here[pair_of_step(j, q, r, PLANES, GROUP_PLANES, REPS)]
                            zero = _spread(zero, WARPS, P)
                        plane = _plane(
                            turned[r], scale, zero, plane_of_step(j, q, PLANES), BITS, HAS_ZERO, BF16
                        )
                        found = found + (plane,)
                    a = _operand(found, WARPS, A, 4 // PIECES)
                    if r == 0 and h == 0:
                        mbarrier.wait(full[j % STAGES], phase)
                    if PIECES == 1:
                        b = held[j % STAGES].permute((1, 0))
                    else:
                        b = held[j % STAGES].slice(h * (64 // PIECES), 64 // PIECES, 1).permute((1, 0))
                    c = warpgroup_mma(a, b, acc[r], is_async=True)
                    c = warpgroup_mma_wait(OPEN, deps=[c])
                    acc = acc[:r] + (c,) + acc[r + 1 :]
                    if r * PIECES + h == OPEN - 1:
                        # what the step before read is free once every warp has come so far
                        barrier()
                        column = start * UNIT + (j + STAGES - 1) * 64
                        more = column < last * UNIT
                        mbarrier.expect(full[(j + STAGES - 1) % STAGES], BT * 128, pred=more)
                        load_tile(
                        x, [first_row, column], full[(j + STAGES - 1) % STAGES],
                        held[(j + STAGES - 1) % STAGES], pred=more,
                    )  # fmt: skip
            if j % STAGES == STAGES - 1:
                phase = phase ^ 1
    BY_ROW: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16] if WARPS >= 8 else [4, 8], [WARPS, 1], [1, 0])
    out = ()
    for r in gl.static_range(REPS):
        out = out + (warpgroup_mma_wait(0, deps=[acc[r]]),)
    if SPLIT:
        row = gl.arange(0, WARPS * 16, gl.SliceLayout(1, ACC))[:, None] * BT
        to = sums + turn.to(gl.int64) * (PARTS * ROWS * BT) + row
        to = to + gl.arange(0, BT, gl.SliceLayout(0, ACC))[None, :]
        for r in gl.static_range(REPS):
            gl.store(to + part * (ROWS * BT) + r * (WARPS * 16 * BT), out[r])
        barrier()  # all of this program's sums are written before it reports
        if gl.atomic_add(arrived + turn, 1, sem="acq_rel") != PARTS - 1:
            return
        barrier()
        gl.store(arrived + turn, 0)
    for r in gl.static_range(REPS):
        if SPLIT:
            o = gl.load(to + r * (WARPS * 16 * BT), cache_modifier=".cg")
            for q in range(1, PARTS):
                o += gl.load(to + q * (ROWS * BT) + r * (WARPS * 16 * BT), cache_modifier=".cg")
        else:
            o = out[r]
        if HAS_BIAS:
            n = block * ROWS + r * (WARPS * 16) + gl.arange(0, WARPS * 16, gl.SliceLayout(1, ACC))
            o += gl.load(bias + n, mask=n < N, other=0.0).to(gl.float32)[:, None]
        final = gl.convert_layout(gl.permute(o.to(KIND), (1, 0)), BY_ROW)
        mm = first_row + gl.arange(0, BT, gl.SliceLayout(1, BY_ROW))
        nn = block * ROWS + r * (WARPS * 16) + gl.arange(0, WARPS * 16, gl.SliceLayout(0, BY_ROW))
        mask = (mm < M)[:, None] & (nn < N)[None, :]
        gl.store(y + mm.to(gl.int64)[:, None] * N + nn[None, :], final, mask=mask)
