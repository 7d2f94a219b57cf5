"""The kernel for few rows of x: codes go from memory into the tensor cores' registers and nowhere else.

The product is computed transposed, weights times inputs, so that eight rows of x cost what one costs. A warp takes
R tiles of 16 rows and one *slice* of K. Slices lie in *parts*; the sums of a part's slices are added in their
order, then those of the parts. So what is added to what is decided by the numbers of slices and parts alone: a row
of x has the same bits alone and in any batch, however the rest is cut. A program takes all parts of its rows (few
rows of x), or one: then each writes its sums, and the one that comes last adds them. Where x is large it waits in
shared memory. Written in Gluon, because every layout has to be known: a thread's registers are the operands of
`mma`, laid by packing.py. Knows no tuning.
"""

# ruff: noqa: RUF005, SIM102, SIM108, SIM300 - what ruff would rather see is no Triton
# mypy: disable-error-code="assignment, var-annotated"

from __future__ import annotations

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantmill.kernels.triton.codes import class_of, minus_pair, pair, plane_ptx, planes, powers, words_in

# Triton 3.9 gave both new names and took the old ones away.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
load_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@triton.constexpr_function
def mma_ptx(bf16):
    """Two products of 16 columns: $0-3 = $16-19 + A($4-7) B($12-13) + A($8-11) B($14-15)."""
    kind = "bf16" if bf16 else "f16"
    mma = f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
    return (
        "{ .reg .f32 d<4>; "
        + mma + "{d0,d1,d2,d3}, {$4,$5,$6,$7}, {$12,$13}, {$16,$17,$18,$19}; "
        + mma + "{$0,$1,$2,$3}, {$8,$9,$10,$11}, {$14,$15}, {d0,d1,d2,d3}; }"
    )  # fmt: skip


@triton.constexpr_function
def mma_half_ptx(half, bf16):
    """One product of 16 columns, with the first or second half of x: $0-3 = $12-15 + A($4-7) B($8-9 or $10-11)."""
    kind = "bf16" if bf16 else "f16"
    x = "{$10,$11}" if half else "{$8,$9}"
    return (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        + "{$0,$1,$2,$3}, {$4,$5,$6,$7}, " + x + ", {$12,$13,$14,$15};"
    )  # fmt: skip


@triton.constexpr_function
def minus_ptx(log2, bits, bf16):
    """$0-3: for every register of A minus the power, less the zero point's distance from the middle ($4)."""
    if bf16 and bits != 8:  # the pair is float16, small whole numbers: exact in both
        convert = (
            "{ .reg .b16 l, h; .reg .f32 a, b; mov.b32 {l, h}, $4; cvt.f32.f16 a, l; cvt.f32.f16 b, h; "
            "cvt.rn.bf16x2.f32 z, b, a; }"
        )
        add = "mov.b32 u, 0x3f803f80; fma.rn.bf16x2 z, z, u, c;"
    else:
        convert, add = "mov.b32 z, $4;", "add.rn.f16x2 z, z, c;"
    constant = pair(-(2.0**log2 + 2 ** (bits - 1)), bf16 and bits != 8)
    spread = "prmt.b32 $0, z, z, 0x1010; prmt.b32 $1, z, z, 0x3232; mov.b32 $2, $0; mov.b32 $3, $1;"
    return "{ .reg .b32 z, c, u; " + convert + f" mov.b32 c, 0x{constant:08x}; " + add + spread + " }"


@triton.constexpr_function
def power_of_two(n):
    """The least that is not below n."""
    return 1 << (n - 1).bit_length()


SCALE = gl.constexpr(
    "{ .reg .b16 l, h; .reg .f32 a, b; mov.b32 {l, h}, $12; cvt.f32.f16 a, l; cvt.f32.f16 b, h; "
    "fma.rn.f32 $0, $4, a, $8; fma.rn.f32 $1, $5, a, $9; fma.rn.f32 $2, $6, b, $10; fma.rn.f32 $3, $7, b, $11; }"
)


@gluon.jit
def _plane(a, b, c, minus, PLANE: gl.constexpr, BITS: gl.constexpr, BF16: gl.constexpr):
    """Plane PLANE of a thread's words as the registers of A."""
    PTX: gl.constexpr = plane_ptx(PLANE, BITS, BF16)
    if BITS == 3:
        value = gl.inline_asm_elementwise(
            PTX, "=r,r,r,r,r", [minus, a, b, c], dtype=gl.int32, is_pure=True, pack=1
        )
    else:
        value = gl.inline_asm_elementwise(PTX, "=r,r,r", [minus, a], dtype=gl.int32, is_pure=True, pack=1)
    return value


@gluon.jit
def _mma(acc, a, b, x, BF16: gl.constexpr):
    PTX: gl.constexpr = mma_ptx(BF16)
    return gl.inline_asm_elementwise(
        PTX, "=f,=f,=f,=f,r,r,r,r,r,r,r,r,r,r,r,r,f,f,f,f", [a, b, x, acc], gl.float32, True, 4
    )


@gluon.jit
def _mma_half(acc, a, x, HALF: gl.constexpr, BF16: gl.constexpr):
    PTX: gl.constexpr = mma_half_ptx(HALF, BF16)
    return gl.inline_asm_elementwise(
        PTX, "=f,=f,=f,=f,r,r,r,r,r,r,r,r,f,f,f,f", [a, x, acc], gl.float32, True, 4
    )


@gluon.jit
def _scaled(part, total, scale):
    return gl.inline_asm_elementwise(
        SCALE, "=f,=f,=f,=f,f,f,f,f,f,f,f,f,r,r,r,r", [part, total, scale], gl.float32, True, 4
    )


@gluon.jit
def _minus(zero, CLASS: gl.constexpr, BITS: gl.constexpr, BF16: gl.constexpr):
    PTX: gl.constexpr = minus_ptx(powers(BITS, BF16)[CLASS], BITS, BF16)
    return gl.inline_asm_elementwise(PTX, "=r,=r,=r,=r,r,r,r,r", [zero], gl.int32, True, 4)


@gluon.jit
def _stacked(parts, WR: gl.constexpr, WK: gl.constexpr, R: gl.constexpr, NT: gl.constexpr):
    """Every warp's sums, R * NT times 128 of them -> (WK, rows of x, rows of weights)."""
    if R * NT == 1:
        value = parts[0]
    elif R * NT == 2:
        value = gl.join(parts[0], parts[1])
    elif R * NT == 4:
        value = gl.join(gl.join(parts[0], parts[2]), gl.join(parts[1], parts[3]))
    else:
        low = gl.join(gl.join(parts[0], parts[4]), gl.join(parts[2], parts[6]))
        value = gl.join(low, gl.join(gl.join(parts[1], parts[5]), gl.join(parts[3], parts[7])))
    value = gl.reshape(value, [WR, WK, 8, 4, 2, 2, R, NT])  # g, quad, row half, column, tile, block of x
    value = gl.permute(value, [1, 7, 3, 5, 0, 6, 4, 2])
    return gl.reshape(value, [WK, NT * 8, WR * R * 16])


@gluon.jit
def _inputs(pointers, BLOCK: gl.constexpr, left, NT: gl.constexpr, MASKED: gl.constexpr):
    """Block BLOCK (32 columns) of this warp's slice of x, as B registers: NT tensors. `left`: blocks there are."""
    found = ()
    for n in gl.static_range(NT):
        at = pointers[n] + BLOCK * 16
        if MASKED:
            found = found + (gl.load(at, mask=BLOCK < left, other=0),)
        else:
            found = found + (gl.load(at),)
    return found


@gluon.jit
def _staged(held, BLOCK: gl.constexpr, like, NT: gl.constexpr, WR: gl.constexpr, WK: gl.constexpr):
    """The same from shared memory (blocks, NT, WK, 128), for every warp its own slice's."""
    B: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 1, 32], [WR, WK, 1], [2, 1, 0])
    found = ()
    for n in gl.static_range(NT):
        wide = held.slice(BLOCK * NT + n, 1, 0).load(B) + gl.zeros([WR, WK, 128], gl.int32, B)
        found = found + (gl.convert_layout(gl.reshape(wide, [WR * WK * 32, 4]), like, assert_trivial=True),)
    return found


@gluon.jit
def _unit(at, UNIT: gl.constexpr, left, WORDS: gl.constexpr, MASKED: gl.constexpr):
    """The words of one unit: WORDS tensors. `left`: units of this warp's slice that there are."""
    found = ()
    for w in gl.static_range(WORDS):
        if MASKED:
            word = gl.load(
                at + (UNIT * WORDS + w) * 128, mask=UNIT < left, other=0, eviction_policy="evict_first"
            )
        else:
            word = gl.load(at + (UNIT * WORDS + w) * 128, eviction_policy="evict_first")
        found = found + (word,)
    return found


@gluon.jit
def _pair(at, GROUP: gl.constexpr, left, MASKED: gl.constexpr):
    """One group's pair of scales or zero points for a thread's rows."""
    if MASKED:
        value = gl.load(at + GROUP * 8, mask=GROUP < left, other=0)
    else:
        value = gl.load(at + GROUP * 8)
    return value


@triton.constexpr_function
def begins(plane, slice_planes, group_planes):
    """Whether a group or a slice begins with this plane of a warp's: what was summed so far has to be scaled."""
    return plane % group_planes == 0 or plane % slice_planes == 0


@gluon.jit
def _both(a, b, COUNT: gl.constexpr):
    """a + b, COUNT tensors each."""
    found = ()
    for i in gl.static_range(COUNT):
        found = found + (a[i] + b[i],)
    return found


@gluon.jit
def _pairs(
    at,
    UNIT: gl.constexpr,
    left,
    R: gl.constexpr,
    GROUPS: gl.constexpr,
    PLANES: gl.constexpr,
    GROUP_PLANES: gl.constexpr,
    SLICE: gl.constexpr,
    MASKED: gl.constexpr,
):
    """Pairs of the groups that begin in a unit, or go on where a slice begins, for R tiles."""
    found = ()
    for p in gl.static_range(PLANES):
        if begins(UNIT * PLANES + p, SLICE * PLANES, GROUP_PLANES):
            for r in gl.static_range(R):
                to = at + r * (GROUPS * 8)
                found = found + (_pair(to, (UNIT * PLANES + p) // GROUP_PLANES, left, MASKED),)
    return found


@gluon.jit
def _minuses(
    zeros,
    like,
    R: gl.constexpr,
    BITS: gl.constexpr,
    BF16: gl.constexpr,
    HAS_ZERO: gl.constexpr,
):
    """For R tiles and every class of planes: minus (power + zero point), for each register of A."""
    found = ()
    for r in gl.static_range(R):
        for k in gl.static_range(len(powers(BITS, BF16))):
            if HAS_ZERO:
                found = found + (_minus(zeros[r][:, None] + like, k, BITS, BF16),)
            else:
                found = found + (like + minus_pair(powers(BITS, BF16)[k], BITS, BF16),)
    return found


@gluon.jit
def _products(
    part,
    ring,
    minus,
    xs,
    none,
    PAIR: gl.constexpr,
    START: gl.constexpr,
    R: gl.constexpr,
    NT: gl.constexpr,
    BITS: gl.constexpr,
    BF16: gl.constexpr,
):
    """part + the planes 2 * PAIR and the next, of R tiles, times x; without part where a group begins."""
    WORDS: gl.constexpr = words_in(BITS)
    CLASSES: gl.constexpr = len(powers(BITS, BF16))
    found = ()
    for r in gl.static_range(R):
        a = ring[r * WORDS]
        b = ring[r * WORDS + 1] if WORDS == 3 else a
        c = ring[r * WORDS + 2] if WORDS == 3 else a
        left = _plane(a, b, c, minus[r * CLASSES + class_of(2 * PAIR, BITS, BF16)], 2 * PAIR, BITS, BF16)
        right = _plane(
            a, b, c, minus[r * CLASSES + class_of(2 * PAIR + 1, BITS, BF16)], 2 * PAIR + 1, BITS, BF16
        )
        for n in gl.static_range(NT):
            acc = none if START else part[r * NT + n]
            found = found + (_mma(acc, left, right, xs[n], BF16),)
    return found


@gluon.jit
def _half_products(
    ring,
    minus,
    xs,
    none,
    PLANE: gl.constexpr,
    R: gl.constexpr,
    NT: gl.constexpr,
    BITS: gl.constexpr,
    BF16: gl.constexpr,
):
    """One plane of R tiles times x: a group by itself."""
    WORDS: gl.constexpr = words_in(BITS)
    CLASSES: gl.constexpr = len(powers(BITS, BF16))
    found = ()
    for r in gl.static_range(R):
        a = ring[r * WORDS]
        b = ring[r * WORDS + 1] if WORDS == 3 else a
        c = ring[r * WORDS + 2] if WORDS == 3 else a
        plane = _plane(a, b, c, minus[r * CLASSES + class_of(PLANE, BITS, BF16)], PLANE, BITS, BF16)
        for n in gl.static_range(NT):
            found = found + (_mma_half(none, plane, xs[n], PLANE % 2, BF16),)
    return found


@gluon.jit
def _added(part, total, scales, like, R: gl.constexpr, NT: gl.constexpr):
    """total + part times its scales."""
    found = ()
    for r in gl.static_range(R):
        for n in gl.static_range(NT):
            found = found + (_scaled(part[r * NT + n], total[r * NT + n], scales[r][:, None] + like),)
    return found


@gluon.jit
def _summed(held, FIRST: gl.constexpr, COUNT: gl.constexpr, L: gl.constexpr):
    """Slices FIRST, FIRST + 1 ... of (WK, rows of x, rows) in shared memory, added in this order."""
    out = held.slice(FIRST, 1, 0).load(L)
    for k in gl.static_range(1, COUNT):
        out += held.slice(FIRST + k, 1, 0).load(L)
    return out


@gluon.jit
def _squares(sums, first_row, M, ROWS: gl.constexpr, COUNT: gl.constexpr, W: gl.constexpr):
    """For ROWS rows of x the sums of squares of what was before x's norm."""
    F: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [W, 1], [1, 0])
    m = (first_row + gl.arange(0, ROWS, gl.SliceLayout(1, F)))[:, None]
    i = gl.arange(0, power_of_two(COUNT), gl.SliceLayout(0, F))[None, :]
    return gl.load(sums + m * COUNT + i, mask=(m < M) & (i < COUNT), other=0.0)


@gluon.jit
def _kept(value, to, mask):
    """Store, within the range of the type: an overflow must not become an infinity."""
    if to.dtype.element_ty == gl.float16:
        value = gl.minimum(gl.maximum(value, -65504.0), 65504.0)
    gl.store(to, value.to(to.dtype.element_ty), mask=mask)


@gluon.jit(do_not_specialize=["M"])
def few_kernel(
    x,  # (M, K) fp16 or bf16 as pairs, int32, rows `stride` pairs apart
    words,  # (tiles, UNITS, WORDS, 32, 4) int32
    scales,  # (tiles, groups, 8) int32
    zeros,  # the same; not read unless HAS_ZERO
    bias,  # (N,) float16; not read unless HAS_BIAS
    y,  # (M, N), rows `y_stride` apart, any float; (M, places) where END is 1; added to where END is 2
    sums,  # (programs, rows of x, rows) float32; not touched unless SPLIT
    arrived,  # (programs / PARTS,) int32 zeros, zeros again afterwards; likewise
    position,  # (outputs,) int32: where an output goes in y (END 1) or after (END 2); unless HAS_POSITION: there
    after,  # (M, places) fp16 or bf16: END 2, the next linear's x, rows `after_stride` apart
    gain,  # (N,) any float: END 2, of the norm before it
    squares,  # (M, N / 16) float32: END 2, sums of the squares of 16 new values of y
    normed,  # (M, COUNT) float32: COUNT > 0, sums of squares that x's norm is made from
    M,
    N,
    stride,
    y_stride,
    after_stride,
    times,  # END 2: y += result * times
    scale,  # END 1: y = silu * up * scale; END 2: after = y * gain * scale
    unscale,  # COUNT > 0: results are times this and x's norm
    inverse,  # 1 / columns of what was before x's norm
    epsilon,
    BLOCKS: gl.constexpr,  # of 32 columns, in x
    UNITS: gl.constexpr,
    BITS: gl.constexpr,
    GROUP_PLANES: gl.constexpr,  # planes that share a scale
    NARROW: gl.constexpr,
    HAS_ZERO: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    BF16: gl.constexpr,
    WK: gl.constexpr,  # warps along K; 1, or TURNS is
    PARTS: gl.constexpr,  # of K; the slices are in so many groups
    SPLIT: gl.constexpr,  # a program takes one part, else all
    STAGED: gl.constexpr,  # x goes through shared memory
    WR: gl.constexpr,  # warps beside each other
    R: gl.constexpr,  # tiles of a warp
    NT: gl.constexpr,  # blocks of 8 rows of x
    SLICE: gl.constexpr,  # units of a slice
    TURNS: gl.constexpr,  # slices that a warp takes, one after the other
    AHEAD: gl.constexpr,  # units asked for before they are needed
    BLOCKS_AHEAD: gl.constexpr,  # blocks of x likewise
    END: gl.constexpr,  # 0: store; 1: silu(gate) * up, tiles hold 8 rows of each; 2: add and prepare what is after
    COUNT: gl.constexpr,
    HAS_POSITION: gl.constexpr,
    PDL: gl.constexpr,
):
    """One program: 16 * R * WR rows of weights times 8 * NT rows of x over all of K."""
    WORDS: gl.constexpr = words_in(BITS)
    PLANES: gl.constexpr = planes(BITS)
    PER_UNIT: gl.constexpr = PLANES // 2  # blocks of a unit
    T: gl.constexpr = WK * WR * 32
    RB: gl.constexpr = WR * R * 16  # rows of weights
    XB: gl.constexpr = NT * 8  # rows of x
    GROUPS: gl.constexpr = (UNITS * PLANES + GROUP_PLANES - 1) // GROUP_PLANES
    SLICES: gl.constexpr = WK * TURNS * (PARTS if SPLIT else 1)  # of all K
    MINE: gl.constexpr = SLICE * TURNS  # units of a warp
    TAIL: gl.constexpr = UNITS != SLICE * SLICES  # the last slices are shorter
    SHORT: gl.constexpr = BLOCKS != SLICE * SLICES * PER_UNIT  # x is
    P: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [WK * WR, 1], [1, 0])
    tid = gl.arange(0, T, gl.SliceLayout(1, P))
    r4 = gl.arange(0, 4, gl.SliceLayout(0, P))[None, :]
    lane, warp = tid & 31, tid >> 5
    wk, wr = warp % WK, warp // WK
    blocks_of_x = gl.cdiv(M, 8 * NT)
    SPAN: gl.constexpr = PARTS if SPLIT else 1
    turn = gl.program_id(0) // SPAN
    part_here = gl.program_id(0) % SPAN
    block, first_row = turn // blocks_of_x, turn % blocks_of_x * (8 * NT)
    tile = (block * WR + wr) * R
    first = (part_here * WK + wk) * MINE  # this warp's first unit
    first_group = first * PLANES // GROUP_PLANES
    at = words + ((tile * UNITS + first).to(gl.int64) * (WORDS * 128) + lane * 4)[:, None] + r4
    group_at = (tile * GROUPS + first_group) * 8 + (lane >> 2)
    scales_at, zeros_at = scales + group_at, zeros + group_at
    units_left = (UNITS - first)[:, None]
    groups_left = GROUPS - first_group
    blocks_left = (BLOCKS - first * PER_UNIT)[:, None]
    L: gl.constexpr = gl.BlockedLayout([1, 1], [2, 16] if RB == 16 else [1, 32], [WK * WR, 1], [1, 0])
    row_y = first_row + gl.arange(0, XB, gl.SliceLayout(1, L))
    out_y = block * RB + gl.arange(0, RB, gl.SliceLayout(0, L))
    in_y = (row_y < M)[:, None] & (out_y < N)[None, :]
    line = row_y.to(gl.int64)[:, None]
    if PDL:  # weights depend on no kernel before this one, results of kernels may
        gdc_launch_dependents()
    ring, ring_scales, ring_zeros = (), (), ()
    for u in gl.static_range(AHEAD):
        for r in gl.static_range(R):
            ring = ring + _unit(at + r * (UNITS * WORDS * 128), u, units_left, WORDS, TAIL)
        ring_scales = ring_scales + _pairs(
            scales_at, u, groups_left, R, GROUPS, PLANES, GROUP_PLANES, SLICE, TAIL
        )
        if HAS_ZERO:
            ring_zeros = ring_zeros + _pairs(
                zeros_at, u, groups_left, R, GROUPS, PLANES, GROUP_PLANES, SLICE, TAIL
            )
    if HAS_BIAS:  # what the end needs is asked for here, so that no sum waits for it
        biases = gl.load(bias + out_y, mask=out_y < N, other=0.0).to(gl.float32)
    if END == 2:
        gains = gl.load(gain + out_y, mask=out_y < N, other=0.0).to(gl.float32) * scale
        place = out_y
        if HAS_POSITION:
            place = gl.load(position + out_y, mask=out_y < N, other=0)
    if PDL:
        gdc_wait()
    if COUNT > 0:
        if not SPLIT:
            before = _squares(normed, first_row, M, XB, COUNT, WK * WR)
    if END == 2:
        at_y = y + line * y_stride + out_y[None, :]
        if not SPLIT:
            old = gl.load(at_y, mask=in_y, other=0.0).to(gl.float32)
    pointers = ()
    if STAGED:
        C: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 1, 32], [WR, WK, 1], [2, 1, 0])
        HELD: gl.constexpr = power_of_two(MINE * PER_UNIT * NT)
        i4 = gl.arange(0, 128, gl.SliceLayout(0, gl.SliceLayout(1, C)))[None, None, :]
        w4 = gl.arange(0, WK, gl.SliceLayout(0, gl.SliceLayout(2, C)))[None, :, None]
        which = gl.arange(0, HELD, gl.SliceLayout(1, gl.SliceLayout(2, C)))[:, None, None]  # block, rows
        held = gl.allocate_shared_memory(
            gl.int32, [HELD, WK, 128], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
        )
        if NARROW:
            in_block = i4 // 4 % 4 * 2 + i4 % 2 + i4 // 2 % 2 * 8
        else:
            in_block = i4 % 16
        row = gl.minimum(first_row + which % NT * 8 + i4 // 16, M - 1)
        k = (part_here * WK + w4) * (MINE * PER_UNIT) + which // NT
        mask = (which < MINE * PER_UNIT * NT) & (k < BLOCKS) & (i4 >= 0)
        load_async(held, x + row * stride + k * 16 + in_block, mask=mask)
        async_copy.commit_group()
        async_copy.wait_group(0)
    else:
        if NARROW:
            inside = (lane & 3)[:, None] * 2 + (r4 & 1) + (r4 >> 1) * 8
        else:
            inside = (lane & 3)[:, None] * 4 + r4
        for n in gl.static_range(NT):
            row = gl.minimum(first_row + n * 8 + (lane >> 2), M - 1)
            pointers = pointers + (x + (row * stride + first * (PER_UNIT * 16))[:, None] + inside,)
    xs = ()
    for i in gl.static_range(BLOCKS_AHEAD):
        if STAGED:
            xs = xs + _staged(held, i, P, NT, WR, WK)
        else:
            xs = xs + _inputs(pointers, i, blocks_left, NT, SHORT)

    none = gl.zeros([T, 4], gl.float32, P)
    pairs = gl.zeros([T, 4], gl.int32, P)
    total = ()
    for _ in gl.static_range(R * NT):
        total = total + (none,)
    part = total
    minus = ()
    whole = ()
    for u in gl.static_range(MINE):
        for i in gl.static_range(PER_UNIT):
            here = xs[:NT]
            xs = xs[NT:]
            if u * PER_UNIT + i + BLOCKS_AHEAD < MINE * PER_UNIT:
                if STAGED:
                    xs = xs + _staged(held, u * PER_UNIT + i + BLOCKS_AHEAD, P, NT, WR, WK)
                else:
                    xs = xs + _inputs(pointers, u * PER_UNIT + i + BLOCKS_AHEAD, blocks_left, NT, SHORT)
            if GROUP_PLANES == 1:
                for h in gl.static_range(2):
                    minus = _minuses(ring_zeros, pairs, R, BITS, BF16, HAS_ZERO)
                    part = _half_products(ring, minus, here, none, 2 * i + h, R, NT, BITS, BF16)
                    total = _added(part, total, ring_scales, pairs, R, NT)
                    ring_scales = ring_scales[R:]
                    if HAS_ZERO:
                        ring_zeros = ring_zeros[R:]
            else:
                if begins(u * PLANES + 2 * i, SLICE * PLANES, GROUP_PLANES):
                    minus = _minuses(ring_zeros, pairs, R, BITS, BF16, HAS_ZERO)
                part = _products(
                    part, ring, minus, here, none, i, begins(u * PLANES + 2 * i, SLICE * PLANES, GROUP_PLANES),
                    R, NT, BITS, BF16,
                )  # fmt: skip
                if begins(u * PLANES + 2 * i + 2, SLICE * PLANES, GROUP_PLANES):
                    total = _added(part, total, ring_scales, pairs, R, NT)
                    ring_scales = ring_scales[R:]
                    if HAS_ZERO:
                        ring_zeros = ring_zeros[R:]
        ring = ring[R * WORDS :]
        if u + AHEAD < MINE:
            for r in gl.static_range(R):
                ring = ring + _unit(at + r * (UNITS * WORDS * 128), u + AHEAD, units_left, WORDS, TAIL)
            ring_scales = ring_scales + _pairs(
                scales_at, u + AHEAD, groups_left, R, GROUPS, PLANES, GROUP_PLANES, SLICE, TAIL
            )
            if HAS_ZERO:
                ring_zeros = ring_zeros + _pairs(
                    zeros_at, u + AHEAD, groups_left, R, GROUPS, PLANES, GROUP_PLANES, SLICE, TAIL
                )
        if (u + 1) % SLICE == 0 and TURNS > 1:
            whole = total if u < SLICE else _both(whole, total, R * NT)
            total = ()
            for _ in gl.static_range(R * NT):
                total = total + (none,)
    if TURNS > 1:
        total = whole

    held_sums = gl.allocate_shared_memory(
        gl.float32, [WK, XB, RB], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    )
    held_sums.store(_stacked(total, WR, WK, R, NT))
    L3: gl.constexpr = gl.BlockedLayout(
        [1, 1, 1], [1, 2, 16] if RB == 16 else [1, 1, 32], [1, WK * WR, 1], [2, 1, 0]
    )
    if SPLIT:
        out = _summed(held_sums, 0, WK, L3)
    else:
        out = _summed(held_sums, 0, WK // PARTS, L3)
        for q in gl.static_range(1, PARTS):
            out += _summed(held_sums, q * (WK // PARTS), WK // PARTS, L3)
    out = gl.convert_layout(gl.reshape(out, [XB, RB]), L)
    i = gl.arange(0, XB, gl.SliceLayout(1, L))
    j = gl.arange(0, RB, gl.SliceLayout(0, L))
    if SPLIT:
        to = sums + turn.to(gl.int64) * (PARTS * XB * RB) + i[:, None] * RB + j[None, :]
        gl.store(to + part_here * (XB * RB), out)
        barrier()  # all of this program's sums are written before it reports
        if gl.atomic_add(arrived + turn, 1, sem="acq_rel") != PARTS - 1:
            return
        barrier()
        out = gl.load(to, cache_modifier=".cg")
        for q in gl.static_range(1, PARTS):
            out += gl.load(to + q * (XB * RB), cache_modifier=".cg")
        gl.store(arrived + turn, 0)
        if COUNT > 0:
            before = _squares(normed, first_row, M, XB, COUNT, WK * WR)
        if END == 2:
            old = gl.load(at_y, mask=in_y, other=0.0).to(gl.float32)
    if COUNT > 0:
        factor = gl.rsqrt(gl.sum(before, 1) * inverse + epsilon) * unscale
        out *= gl.convert_layout(factor, gl.SliceLayout(1, L))[:, None]
    if HAS_BIAS:
        out += biases[None, :]
    if END == 0:
        _kept(out, y + line * y_stride + out_y[None, :], in_y)
    elif END == 1:
        both = gl.permute(gl.reshape(out, [XB, RB // 16, 2, 8]), [0, 1, 3, 2])
        G: gl.constexpr = gl.BlockedLayout([1, 1, 1, 2], [2, 2, 8, 1], [WK * WR, 1, 1, 1], [3, 2, 1, 0])
        gate, up = gl.split(gl.convert_layout(both, G))
        H: gl.constexpr = gl.BlockedLayout([1, 1], [4, 8] if RB == 16 else [2, 16], [WK * WR, 1], [1, 0])
        product = gate / (1.0 + gl.exp(-gate)) * up * scale
        product = gl.convert_layout(gl.reshape(product, [XB, RB // 2]), H)
        m = first_row + gl.arange(0, XB, gl.SliceLayout(1, H))
        n = block * (RB // 2) + gl.arange(0, RB // 2, gl.SliceLayout(0, H))
        to_n = n
        if HAS_POSITION:
            to_n = gl.load(position + n, mask=n < N // 2, other=0)
        mask = (m < M)[:, None] & (n < N // 2)[None, :]
        _kept(product, y + m.to(gl.int64)[:, None] * y_stride + to_n[None, :], mask)
    else:
        out = gl.where(in_y, old + out * times, 0.0)
        gl.store(at_y, out.to(y.dtype.element_ty), mask=in_y)
        _kept(out * gains[None, :], after + line * after_stride + place[None, :], in_y)
        Q: gl.constexpr = gl.BlockedLayout([1, 1, 16], [32, 1, 1], [WK * WR, 1, 1], [2, 1, 0])
        parts = gl.convert_layout(gl.reshape(out * out, [XB, RB // 16, 16]), Q)
        square = gl.sum(parts, 2)  # each by one thread: in the same order whatever the cut
        mq = first_row + gl.arange(0, XB, gl.SliceLayout(1, gl.SliceLayout(2, Q)))[:, None]
        nq = block * (RB // 16) + gl.arange(0, RB // 16, gl.SliceLayout(0, gl.SliceLayout(2, Q)))[None, :]
        gl.store(squares + mq * (N // 16) + nq, square, mask=(mq < M) & (nq < N // 16))
