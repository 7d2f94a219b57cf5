"""The kernel for many rows of x on Hopper: weights are made in the registers that `wgmma` reads, x is in shared
memory.

Programs stay: each takes an equal share of all steps of all tiles, so no multiprocessor waits for another's last
tile. A tile (16 * WARPS * REPS rows of weights times BT rows of x) that a share ends within is finished by its last
program, which adds the sums of all in their order. As many tiles as possible are left whole.

A program makes each weight once for up to 256 rows of x, rounded to x's dtype as in a dense copy, while the tensor
cores work on what was made before; it never writes one anywhere. x comes through the copy engine, three blocks of
64 columns ahead, and results leave through it. Columns are summed in their order, but where shares end depends on
the rows of x: a row has the same bits every time, not in every batch. Compute capability 9.0. Knows no tuning.
"""

# ruff: noqa: RUF005 - what ruff would rather see is no Triton
# mypy: disable-error-code="assignment, attr-defined, misc, var-annotated"

from __future__ import annotations

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantmill.kernels.triton.codes import planes, words_in
from quantmill.kernels.triton.fragments import fields, fragment_ptx, turned_ptx

# Triton 3.9 gave both new names and took the old ones away.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_tile = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


TURN = gl.constexpr(",".join(["=r"] * 4 + ["r"] * 16))
TURN3 = gl.constexpr(",".join(["=r"] * 12 + ["r"] * 28))
PLANE_OF = gl.constexpr(",".join(["=r"] * 4 + ["r"] * 20))


@triton.constexpr_function
def unit_of_step(step, quarter, planes_of_unit):
    """Which unit of a turn holds a quarter of a step of 64 columns."""
    return (4 * step + quarter) // planes_of_unit


@triton.constexpr_function
def plane_of_step(step, quarter, planes_of_unit):
    """And which of its planes."""
    return (4 * step + quarter) % planes_of_unit


@triton.constexpr_function
def units_at_once(planes_of_unit):
    """Units that a step of 64 columns needs whole."""
    return max(1, 4 // planes_of_unit)


@triton.constexpr_function
def asked(unit, rep, planes_of_unit, reps):
    """Where a unit of a warp's tile `rep` is among a turn's: in the order in which steps ask for them."""
    together = units_at_once(planes_of_unit)
    return (unit // together * reps + rep) * together + unit % together


@triton.constexpr_function
def pair_of_step(step, quarter, rep, planes_of_unit, group_planes, reps):
    """Which of a turn's pairs of scales a quarter of a step takes."""
    of_unit = max(1, planes_of_unit // group_planes)
    unit, plane = divmod(4 * step + quarter, planes_of_unit)
    return asked(unit, rep, planes_of_unit, reps) * of_unit + plane // group_planes % of_unit


@gluon.jit
def _turned(words, odd, stay, by, upper, BITS: gl.constexpr):
    """A unit's words with their codes where `wgmma` wants them: a tuple."""
    PTX: gl.constexpr = turned_ptx(BITS)
    if BITS == 3:
        found = gl.inline_asm_elementwise(
            PTX, TURN3, [words[0], words[1], words[2], odd, stay, by, upper],
            (gl.int16, gl.int16, gl.int16), True, 8,
        )  # fmt: skip
    else:
        found = (gl.inline_asm_elementwise(PTX, TURN, [words[0], odd, stay, by], gl.int16, True, 8),)
    return found


@gluon.jit
def _plane(
    words, scale, zero, PLANE: gl.constexpr, BITS: gl.constexpr, HAS_ZERO: gl.constexpr, BF16: gl.constexpr
):
    """A plane of them times the scales: (threads, 8) fp16 or bf16."""
    PTX: gl.constexpr = fragment_ptx(PLANE, BITS, HAS_ZERO, BF16)
    b = words[1] if BITS == 3 else words[0]
    c = words[2] if BITS == 3 else words[0]
    if BF16:
        v = gl.inline_asm_elementwise(PTX, PLANE_OF, [scale, zero, words[0], b, c], gl.bfloat16, True, 8)
    else:
        v = gl.inline_asm_elementwise(PTX, PLANE_OF, [scale, zero, words[0], b, c], gl.float16, True, 8)
    return v


@gluon.jit
def _words(at, WORDS: gl.constexpr):
    """The words of one unit."""
    found = ()
    for w in gl.static_range(WORDS):
        found = found + (gl.load(at + w * 256, eviction_policy="evict_first"),)
    return found


@gluon.jit
def _pairs(at, group, COUNT: gl.constexpr):
    """Pairs of scales or zero points of so many groups from `group` on."""
    found = ()
    for g in gl.static_range(COUNT):
        found = found + (gl.load(at + (group + g) * 16),)
    return found


@gluon.jit
def _spread(pair, WARPS: gl.constexpr, P: gl.constexpr):
    """Pairs of rows g and g + 8, (threads, 2) int16, for every half of a plane's registers: (threads, 8)."""
    B: gl.constexpr = gl.BlockedLayout([1, 2, 2, 2], [32, 1, 1, 1], [WARPS, 1, 1, 1], [3, 2, 1, 0])
    wide = gl.expand_dims(gl.expand_dims(pair, 1), 3) + gl.zeros([WARPS * 32, 2, 2, 2], gl.int16, B)
    return gl.convert_layout(gl.reshape(wide, [WARPS * 32, 8]), P, assert_trivial=True)


@gluon.jit
def _operand(p, WARPS: gl.constexpr, A: gl.constexpr, COUNT: gl.constexpr):
    """So many planes (threads, 8) -> (rows, 16 each)."""
    if COUNT == 1:
        v = gl.reshape(p[0], [WARPS, 8, 4, 2, 2, 2, 1, 1])
    elif COUNT == 2:
        v = gl.reshape(gl.join(p[0], p[1]), [WARPS, 8, 4, 2, 2, 2, 1, 2])
    else:
        v = gl.reshape(gl.join(gl.join(p[0], p[2]), gl.join(p[1], p[3])), [WARPS, 8, 4, 2, 2, 2, 2, 2])
    v = gl.permute(v, [0, 4, 1, 6, 7, 3, 2, 5])  # from warp, g, quad, j, row half, half, plane
    return gl.convert_layout(gl.reshape(v, [WARPS * 16, COUNT * 16]), A, assert_trivial=True)


@gluon.jit
def _by_thread(acc, WARPS: gl.constexpr, BT: gl.constexpr):
    """A tile's sums (rows, BT) -> (threads, BT / 2), each thread's own, stored and read 16 bytes at once."""
    F: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [WARPS, 1], [1, 0])
    v = gl.reshape(acc, [WARPS, 2, 8, BT // 8, 4, 2])  # warp, row half, g, eight columns, quad, two of them
    v = gl.reshape(gl.permute(v, [0, 2, 4, 3, 1, 5]), [WARPS * 32, BT // 2])
    return gl.convert_layout(v, F, assert_trivial=True)


@gluon.jit
def _by_row(v, WARPS: gl.constexpr, BT: gl.constexpr, ACC: gl.constexpr):
    """And back."""
    v = gl.permute(gl.reshape(v, [WARPS, 8, 4, BT // 8, 2, 2]), [0, 4, 1, 3, 2, 5])
    return gl.convert_layout(gl.reshape(v, [WARPS * 16, BT]), ACC, assert_trivial=True)


@gluon.jit
def _pieces(v, ROWS: gl.constexpr, COLUMNS: gl.constexpr, COUNT: gl.constexpr):
    """A tensor (ROWS, COLUMNS) cut into so many, side by side."""
    if COUNT == 1:
        found = (v,)
    else:
        left, right = gl.split(gl.permute(gl.reshape(v, [ROWS, 2, COLUMNS // 2]), [0, 2, 1]))
        found = _pieces(left, ROWS, COLUMNS // 2, COUNT // 2) + _pieces(right, ROWS, COLUMNS // 2, COUNT // 2)
    return found


@gluon.jit
def _unit(
    words, scales, zeros, first, UNIT: gl.constexpr, TILE: gl.constexpr, UNITS: gl.constexpr, WORDS: gl.constexpr,
    PLANES: gl.constexpr, GROUP_PLANES: gl.constexpr, GROUPS: gl.constexpr, SCALES: gl.constexpr,
    HAS_ZERO: gl.constexpr, EVEN: gl.constexpr,
):  # fmt: skip
    """Words, scales and zero points of unit `first` + UNIT, TILE tiles further on. The pointers are at `first`."""
    if EVEN:
        w = _words(words + (UNIT + TILE * UNITS) * (WORDS * 256), WORDS)
        s = _pairs(scales, UNIT * PLANES // GROUP_PLANES + TILE * GROUPS, SCALES)
        z = ()
        if HAS_ZERO:
            z = _pairs(zeros, UNIT * PLANES // GROUP_PLANES + TILE * GROUPS, SCALES)
    else:  # the last turn of K is not full: its last unit again, which meets zeros of x
        more = gl.minimum(first + UNIT, UNITS - 1) - first
        group = (first + more) * PLANES // GROUP_PLANES - first * PLANES // GROUP_PLANES + TILE * GROUPS
        w = _words(words + (more + TILE * UNITS) * (WORDS * 256), WORDS)
        s = _pairs(scales, group, SCALES)
        z = ()
        if HAS_ZERO:
            z = _pairs(zeros, group, SCALES)
    return w, s, z


@gluon.jit
def _turn(i, mine, streamed, begin, total, programs, p, blocks_of_x, TURNS: gl.constexpr):
    """Turn i of a program, of `mine` -> tile, block of rows of weights, block of rows of x, turn of K.

    The first `streamed` of them are turns `begin` ... of the tiles that are shared, `total` turns in all.
    """
    i = gl.minimum(i, mine - 1)
    whole = i - streamed
    turn = gl.where(i < streamed, begin + i, total + (whole // TURNS * programs + p) * TURNS + whole % TURNS)
    tile = turn // TURNS
    return tile, tile // blocks_of_x, tile % blocks_of_x, turn % TURNS


@gluon.jit(do_not_specialize=["M", "TILES", "SHARED"])
def wide_kernel(
    x,  # descriptor of (M, K) fp16 or bf16 in blocks of (BT, 64)
    words,  # (tiles, UNITS, WORDS, 32, 8) int16
    scales,  # (tiles, groups, 8, 2) int16: float16
    zeros,  # the same; not read unless HAS_ZERO
    bias,  # (N,) float16; not read unless HAS_BIAS
    y,  # descriptor of (M, N) as x in blocks of (min(BT, 64), 16 * WARPS)
    sums,  # (2 * programs, rows, BT) float32; not touched unless SHARED
    arrived,  # (SHARED,) int32 zeros, zeros again afterwards
    M,
    N,
    TILES,  # blocks of rows of weights times blocks of rows of x
    SHARED,  # of them: no more than two rounds of all programs; the rest is a multiple of the programs
    UNITS: gl.constexpr,
    BITS: gl.constexpr,
    GROUP_PLANES: gl.constexpr,  # planes that share a scale: an even number
    HAS_ZERO: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    BF16: gl.constexpr,
    WARPS: gl.constexpr,
    BT: gl.constexpr,
    REPS: gl.constexpr,  # tiles of every warp
    AHEAD: gl.constexpr,  # units of a turn: four steps of 64 columns
    DEPTH: gl.constexpr,  # units asked for before they are needed, at most AHEAD
    PIECES: gl.constexpr,  # of a block's 64 columns, multiplied one after the other: 1, 2 or 4
    OPEN: gl.constexpr,  # products that may be unfinished while the next weights are made; at most PIECES * REPS
    PDL: gl.constexpr,
):
    """One program: its share of turns, 256 columns each of a tile."""
    T: gl.constexpr = WARPS * 32
    ROWS: gl.constexpr = WARPS * 16 * REPS
    KIND: gl.constexpr = gl.bfloat16 if BF16 else gl.float16
    PLANES: gl.constexpr = planes(BITS)
    WORDS: gl.constexpr = words_in(BITS)
    UNIT: gl.constexpr = PLANES * 16  # columns
    TOGETHER: gl.constexpr = units_at_once(PLANES)
    STEPS: gl.constexpr = AHEAD * PLANES // 4  # of 64 columns, in a turn; as many blocks of x are held
    gl.static_assert(STEPS == 4)
    gl.static_assert(DEPTH % TOGETHER == 0)
    gl.static_assert(OPEN <= PIECES * REPS)
    GROUPS: gl.constexpr = (UNITS * PLANES + GROUP_PLANES - 1) // GROUP_PLANES
    SCALES: gl.constexpr = (PLANES + GROUP_PLANES - 1) // GROUP_PLANES  # of a unit
    TURNS: gl.constexpr = (UNITS + AHEAD - 1) // AHEAD  # of all of K
    EVEN: gl.constexpr = UNITS % AHEAD == 0
    P: gl.constexpr = gl.BlockedLayout([1, 8], [32, 1], [WARPS, 1], [1, 0])
    B4: gl.constexpr = gl.BlockedLayout([1, 2, 2, 2], [32, 1, 1, 1], [WARPS, 1, 1, 1], [3, 2, 1, 0])
    S: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, B4))
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BT, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    PART: gl.constexpr = min(BT, 64)
    ACC_PART: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, PART, 16])
    LINES: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    p, programs = gl.program_id(0), gl.num_programs(0)
    blocks_of_x = gl.cdiv(M, BT)
    total = SHARED * TURNS
    share = p * total // programs
    streamed = (p + 1) * total // programs - share
    mine = streamed + (TILES - SHARED - p + programs - 1) // programs * TURNS
    tid = gl.arange(0, T, gl.SliceLayout(1, P))
    lane = tid & 31
    words += (((tid >> 5) * UNITS).to(gl.int64) * (WORDS * 256) + lane * 8)[:, None]
    words += gl.arange(0, 8, gl.SliceLayout(0, P))[None, :]
    none = gl.zeros([T, 8], gl.int16, P)
    odd = (0 - (lane & 1)).to(gl.int16)[:, None] + none
    upper = (0 - (lane >> 1 & 1)).to(gl.int16)[:, None] + none
    stay = gl.where((lane & 2) == 0, fields(BITS, False), fields(BITS, True)).to(gl.int16)[:, None] + none
    by = gl.where((lane & 2) == 0, BITS, 32 - BITS).to(gl.int16)[:, None] + none
    stid = gl.arange(0, T, gl.SliceLayout(1, S))
    pair_at = (stid >> 5) * (GROUPS * 16) + ((stid & 31) >> 2) * 2
    pair_at = pair_at[:, None] + gl.arange(0, 2, gl.SliceLayout(0, S))[None, :]
    if PDL:
        gdc_launch_dependents()
    held, full, outs = (), (), ()
    for s in gl.static_range(STEPS):  # of their own each, so that no barrier is put between uses of two
        held = held + (gl.allocate_shared_memory(KIND, [BT, 64], LINES),)
        full = full + (gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()),)
        mbarrier.init(full[s], count=1)
    for _ in gl.static_range(REPS * (BT // PART)):
        outs = outs + (gl.allocate_shared_memory(KIND, [PART, WARPS * 16], LINES),)
    tile, block, block_x, k = _turn(0, mine, streamed, share, total, programs, p, blocks_of_x, TURNS)
    first_tile = (block * (WARPS * REPS)).to(gl.int64)
    words_at = words + (first_tile * UNITS + k * AHEAD) * (WORDS * 256)
    pairs_here = pair_at + (first_tile * GROUPS + k * (AHEAD * PLANES) // GROUP_PLANES) * 16
    scales_at, zeros_at = scales + pairs_here, zeros + pairs_here
    ring, scale_ring, zero_ring = (), (), ()
    for i in gl.static_range(DEPTH // TOGETHER):
        for r in gl.static_range(REPS):
            for u in gl.static_range(TOGETHER):
                w, s, z = _unit(
                    words_at, scales_at, zeros_at, k * AHEAD, i * TOGETHER + u, r * WARPS, UNITS, WORDS, PLANES,
                    GROUP_PLANES, GROUPS, SCALES, HAS_ZERO, EVEN,
                )  # fmt: skip
                ring, scale_ring, zero_ring = ring + (w,), scale_ring + s, zero_ring + z
    fence_async_shared()
    barrier()
    if PDL:
        gdc_wait()
    for j in gl.static_range(STEPS - 1):
        mbarrier.expect(full[j], BT * 128)
        load_tile(x, [block_x * BT, k * (AHEAD * UNIT) + j * 64], full[j], held[j])
    turn = 0
    while turn < mine:
        acc = ()
        for _ in gl.static_range(REPS):
            acc = acc + (gl.zeros([WARPS * 16, BT], gl.float32, ACC),)
        begin = k
        count = TURNS - k
        if turn < streamed:
            count = gl.minimum(count, streamed - turn)
        for k_here in range(begin, begin + count):
            _tile, block_n, block_x_n, k_n = _turn(
                turn + 1, mine, streamed, share, total, programs, p, blocks_of_x, TURNS
            )
            first_tile = (block_n * (WARPS * REPS)).to(gl.int64)
            words_n = words + (first_tile * UNITS + k_n * AHEAD) * (WORDS * 256)
            pairs_here = pair_at + (first_tile * GROUPS + k_n * (AHEAD * PLANES) // GROUP_PLANES) * 16
            scales_n, zeros_n = scales + pairs_here, zeros + pairs_here
            turned = ring[:REPS]
            for j in gl.static_range(STEPS):
                for r in gl.static_range(REPS):
                    for h in gl.static_range(PIECES):
                        found = ()
                        for q in gl.static_range(h * 4 // PIECES, (h + 1) * 4 // PIECES):
                            if plane_of_step(j, q, PLANES) == 0:
                                w = _turned(ring[0], odd, stay, by, upper, BITS)
                                turned = turned[:r] + (w,) + turned[r + 1 :]
                                if unit_of_step(j, q, PLANES) + DEPTH < AHEAD:
                                    w, s, z = _unit(
                                        words_at, scales_at, zeros_at, k_here * AHEAD,
                                        unit_of_step(j, q, PLANES) + DEPTH, r * WARPS, UNITS, WORDS, PLANES,
                                        GROUP_PLANES, GROUPS, SCALES, HAS_ZERO, EVEN,
                                    )  # fmt: skip
                                else:
                                    w, s, z = _unit(
                                        words_n, scales_n, zeros_n, k_n * AHEAD,
                                        unit_of_step(j, q, PLANES) + DEPTH - AHEAD, r * WARPS, UNITS, WORDS,
                                        PLANES, GROUP_PLANES, GROUPS, SCALES, HAS_ZERO, EVEN,
                                    )  # fmt: skip
                                ring, scale_ring, zero_ring = ring[1:] + (w,), scale_ring + s, zero_ring + z
                            scale = scale_ring[pair_of_step(j, q, r, PLANES, GROUP_PLANES, REPS)]
                            scale = _spread(scale, WARPS, P)
                            zero = scale
                            if HAS_ZERO:
                                zero = zero_ring[pair_of_step(j, q, r, PLANES, GROUP_PLANES, REPS)]
                                zero = _spread(zero, WARPS, P)
                            plane = _plane(
                                turned[r], scale, zero, plane_of_step(j, q, PLANES), BITS, HAS_ZERO, BF16
                            )
                            found = found + (plane,)
                        a = _operand(found, WARPS, A, 4 // PIECES)
                        if r == 0 and h == 0:
                            mbarrier.wait(full[j], turn & 1)
                        if PIECES == 1:
                            b = held[j].permute((1, 0))
                        else:
                            b = held[j].slice(h * (64 // PIECES), 64 // PIECES, 1).permute((1, 0))
                        c = warpgroup_mma(a, b, acc[r], is_async=True)
                        c = warpgroup_mma_wait(OPEN, deps=[c])
                        acc = acc[:r] + (c,) + acc[r + 1 :]
                        if r * PIECES + h == OPEN - 1:
                            # what the step before read is free once every warp has come so far
                            barrier()
                            if j == 0:
                                mbarrier.expect(full[STEPS - 1], BT * 128)
                                column = k_here * (AHEAD * UNIT) + (STEPS - 1) * 64
                                load_tile(x, [block_x * BT, column], full[STEPS - 1], held[STEPS - 1])
                            else:
                                more = turn + 1 < mine
                                mbarrier.expect(full[j - 1], BT * 128, pred=more)
                                column = k_n * (AHEAD * UNIT) + (j - 1) * 64
                                load_tile(x, [block_x_n * BT, column], full[j - 1], held[j - 1], pred=more)
            scale_ring = scale_ring[AHEAD * REPS * SCALES :]
            if HAS_ZERO:
                zero_ring = zero_ring[AHEAD * REPS * SCALES :]
            words_at, scales_at, zeros_at = words_n, scales_n, zeros_n
            turn += 1
        out = ()
        for r in gl.static_range(REPS):
            out = out + (warpgroup_mma_wait(0, deps=[acc[r]]),)
        done = (begin == 0) & (count == TURNS)
        if done:
            tma.store_wait(0)
            barrier()  # what was written before has left
            for r in gl.static_range(REPS):
                pieces = _pieces(out[r], WARPS * 16, BT, BT // PART)
                for c in gl.static_range(BT // PART):
                    o = gl.convert_layout(pieces[c], ACC_PART, assert_trivial=True)
                    if HAS_BIAS:
                        n = (
                            block * ROWS
                            + r * (WARPS * 16)
                            + gl.arange(0, WARPS * 16, gl.SliceLayout(1, ACC_PART))
                        )
                        o += gl.load(bias + n, mask=n < N, other=0.0).to(gl.float32)[:, None]
                    outs[r * (BT // PART) + c].permute((1, 0)).store(o.to(KIND))
        else:
            # 64 rows of x at a time: registers are short
            F: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [WARPS, 1], [1, 0])
            at = gl.arange(0, PART // 2, gl.SliceLayout(0, F))[None, :]
            to = sums + at // 4 * (T * 4) + at % 4 + gl.arange(0, T, gl.SliceLayout(1, F))[:, None] * 4
            # a program leaves the sums of two tiles at most: the first's end and the last's beginning
            slot = (2 * p + gl.where(begin == 0, 1, 0)).to(gl.int64) * (ROWS * BT)
            for r in gl.static_range(REPS):
                pieces = _pieces(out[r], WARPS * 16, BT, BT // PART)
                for c in gl.static_range(BT // PART):
                    v = _by_thread(pieces[c], WARPS, PART)
                    gl.store(to + slot + (r * (BT // PART) + c) * (WARPS * 16 * PART), v)
            barrier()  # all of this program's sums are written before it reports
            first_one = ((tile * TURNS + 1) * programs - 1) // total
            last_one = ((tile * TURNS + TURNS) * programs - 1) // total
            done = gl.atomic_add(arrived + tile, 1, sem="acq_rel") == last_one - first_one
            if done:
                barrier()
                gl.store(arrived + tile, 0)
                tma.store_wait(0)
                barrier()
                for r in gl.static_range(REPS):
                    for c in gl.static_range(BT // PART):
                        of = (r * (BT // PART) + c) * (WARPS * 16 * PART)
                        o = gl.load(
                            to + (2 * first_one + 1).to(gl.int64) * (ROWS * BT) + of, cache_modifier=".cg"
                        )
                        for other in range(first_one + 1, last_one + 1):
                            o += gl.load(
                                to + (2 * other).to(gl.int64) * (ROWS * BT) + of, cache_modifier=".cg"
                            )
                        o = _by_row(o, WARPS, PART, ACC_PART)
                        if HAS_BIAS:
                            n = (
                                block * ROWS
                                + r * (WARPS * 16)
                                + gl.arange(0, WARPS * 16, gl.SliceLayout(1, ACC_PART))
                            )
                            o += gl.load(bias + n, mask=n < N, other=0.0).to(gl.float32)[:, None]
                        outs[r * (BT // PART) + c].permute((1, 0)).store(o.to(KIND))
        if done:
            fence_async_shared()
            barrier()
            for r in gl.static_range(REPS):
                for c in gl.static_range(BT // PART):
                    to_y = [block_x * BT + c * PART, block * ROWS + r * (WARPS * 16)]
                    store_tile(y, to_y, outs[r * (BT // PART) + c])
        tile, block, block_x, k = _turn(turn, mine, streamed, share, total, programs, p, blocks_of_x, TURNS)
    tma.store_wait(0)
