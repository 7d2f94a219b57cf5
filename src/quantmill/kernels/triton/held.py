"""The kernel for few rows of x whose programs stay: x waits in shared memory, rows of weights stream by.

What few.py does, with the same bits: a program takes a slice of K a warp, but block after block of rows of weights.
While it works through a block, each word that it has used is replaced by the next block's, so the memory is never
idle, and x is read once a program and not once a block. Pays where x is large (more than eight rows) and the linear
is. Knows no tuning.
"""

# ruff: noqa: RUF005, SIM108 - what ruff would rather see is no Triton
# mypy: disable-error-code="assignment, attr-defined, var-annotated"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantmill.kernels.triton.codes import planes, words_in
from quantmill.kernels.triton.few import (
    _added,
    _half_products,
    _kept,
    _minuses,
    _pairs,
    _products,
    _squares,
    _stacked,
    _staged,
    _summed,
    _unit,
    barrier,
    begins,
    load_async,
    power_of_two,
)


@gluon.jit
def _ended(
    out, block, M, N, bias, y, position, after, gain, squares, normed, y_stride, after_stride, times, scale,
    unscale, inverse, epsilon,
    RB: gl.constexpr, XB: gl.constexpr, W: gl.constexpr, L: gl.constexpr, HAS_BIAS: gl.constexpr,
    END: gl.constexpr, COUNT: gl.constexpr, HAS_POSITION: gl.constexpr,
):  # fmt: skip
    """What few.py does with a block's sums (rows of x, rows of weights)."""
    m = gl.arange(0, XB, gl.SliceLayout(1, L))
    n = block * RB + gl.arange(0, RB, gl.SliceLayout(0, L))
    mask = (m < M)[:, None] & (n < N)[None, :]
    line = m.to(gl.int64)[:, None]
    if COUNT > 0:
        before = _squares(normed, 0, M, XB, COUNT, W)
        factor = gl.rsqrt(gl.sum(before, 1) * inverse + epsilon) * unscale
        out *= gl.convert_layout(factor, gl.SliceLayout(1, L))[:, None]
    if HAS_BIAS:
        out += gl.load(bias + n, mask=n < N, other=0.0).to(gl.float32)[None, :]
    if END == 0:
        _kept(out, y + line * y_stride + n[None, :], mask)
    elif END == 1:
        both = gl.permute(gl.reshape(out, [XB, RB // 16, 2, 8]), [0, 1, 3, 2])
        G: gl.constexpr = gl.BlockedLayout([1, 1, 1, 2], [2, 2, 8, 1], [W, 1, 1, 1], [3, 2, 1, 0])
        gate, up = gl.split(gl.convert_layout(both, G))
        H: gl.constexpr = gl.BlockedLayout([1, 1], [4, 8] if RB == 16 else [2, 16], [W, 1], [1, 0])
        product = gate / (1.0 + gl.exp(-gate)) * up * scale
        product = gl.convert_layout(gl.reshape(product, [XB, RB // 2]), H)
        mh = gl.arange(0, XB, gl.SliceLayout(1, H))
        nh = block * (RB // 2) + gl.arange(0, RB // 2, gl.SliceLayout(0, H))
        place = nh
        if HAS_POSITION:
            place = gl.load(position + nh, mask=nh < N // 2, other=0)
        mask_h = (mh < M)[:, None] & (nh < N // 2)[None, :]
        _kept(product, y + mh.to(gl.int64)[:, None] * y_stride + place[None, :], mask_h)
    else:
        at_y = y + line * y_stride + n[None, :]
        out = gl.where(mask, gl.load(at_y, mask=mask, other=0.0).to(gl.float32) + out * times, 0.0)
        gl.store(at_y, out.to(y.dtype.element_ty), mask=mask)
        gains = gl.load(gain + n, mask=n < N, other=0.0).to(gl.float32) * scale
        place = n
        if HAS_POSITION:
            place = gl.load(position + n, mask=n < N, other=0)
        _kept(out * gains[None, :], after + line * after_stride + place[None, :], mask)
        Q: gl.constexpr = gl.BlockedLayout([1, 1, 16], [32, 1, 1], [W, 1, 1], [2, 1, 0])
        parts = gl.convert_layout(gl.reshape(out * out, [XB, RB // 16, 16]), Q)
        square = gl.sum(parts, 2)  # each by one thread: in the same order whatever the cut
        mq = gl.arange(0, XB, gl.SliceLayout(1, gl.SliceLayout(2, Q)))[:, None]
        nq = block * (RB // 16) + gl.arange(0, RB // 16, gl.SliceLayout(0, gl.SliceLayout(2, Q)))[None, :]
        gl.store(squares + mq * (N // 16) + nq, square, mask=(mq < M) & (nq < N // 16))


@gluon.jit(do_not_specialize=["M", "TILES"])
def held_kernel(
    x,  # all as in few.py
    words,
    scales,
    zeros,
    bias,
    y,
    sums,  # (blocks, PARTS, rows of x, rows) float32; not touched unless SPLIT
    arrived,
    position,
    after,
    gain,
    squares,
    normed,
    M,
    N,
    stride,
    y_stride,
    after_stride,
    times,
    scale,
    unscale,
    inverse,
    epsilon,
    TILES,  # blocks of rows of weights
    BLOCKS: gl.constexpr,
    UNITS: gl.constexpr,
    BITS: gl.constexpr,
    GROUP_PLANES: gl.constexpr,
    NARROW: gl.constexpr,
    HAS_ZERO: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    BF16: gl.constexpr,
    WK: gl.constexpr,
    PARTS: gl.constexpr,
    SPLIT: gl.constexpr,
    WR: gl.constexpr,
    R: gl.constexpr,
    NT: gl.constexpr,
    SLICE: gl.constexpr,
    END: gl.constexpr,
    COUNT: gl.constexpr,
    HAS_POSITION: gl.constexpr,
    PDL: gl.constexpr,
):
    """One program: 16 * R * WR rows of weights at a time, every so many, times 8 * NT rows of x, all there are."""
    WORDS: gl.constexpr = words_in(BITS)
    PLANES: gl.constexpr = planes(BITS)
    PER_UNIT: gl.constexpr = PLANES // 2
    T: gl.constexpr = WK * WR * 32
    RB: gl.constexpr = WR * R * 16
    XB: gl.constexpr = NT * 8
    GROUPS: gl.constexpr = (UNITS * PLANES + GROUP_PLANES - 1) // GROUP_PLANES
    SLICES: gl.constexpr = WK * (PARTS if SPLIT else 1)
    TAIL: gl.constexpr = UNITS != SLICE * SLICES
    P: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [WK * WR, 1], [1, 0])
    tid = gl.arange(0, T, gl.SliceLayout(1, P))
    r4 = gl.arange(0, 4, gl.SliceLayout(0, P))[None, :]
    lane, warp = tid & 31, tid >> 5
    wk, wr = warp % WK, warp // WK
    SPAN: gl.constexpr = PARTS if SPLIT else 1
    begin = gl.program_id(0) // SPAN
    part_here = gl.program_id(0) % SPAN
    step = gl.num_programs(0) // SPAN
    tile = (begin * WR + wr) * R
    first = (part_here * WK + wk) * SLICE
    first_group = first * PLANES // GROUP_PLANES
    at = words + ((tile * UNITS + first).to(gl.int64) * (WORDS * 128) + lane * 4)[:, None] + r4
    group_at = (tile * GROUPS + first_group) * 8 + (lane >> 2)
    scales_at, zeros_at = scales + group_at, zeros + group_at
    units_left = (UNITS - first)[:, None]
    groups_left = GROUPS - first_group
    L: gl.constexpr = gl.BlockedLayout([1, 1], [2, 16] if RB == 16 else [1, 32], [WK * WR, 1], [1, 0])
    if PDL:
        gdc_launch_dependents()
    ring, ring_scales, ring_zeros = (), (), ()
    for u in gl.static_range(SLICE):
        for r in gl.static_range(R):
            ring = ring + _unit(at + r * (UNITS * WORDS * 128), u, units_left, WORDS, TAIL)
        ring_scales = ring_scales + _pairs(
            scales_at, u, groups_left, R, GROUPS, PLANES, GROUP_PLANES, SLICE, TAIL
        )
        if HAS_ZERO:
            ring_zeros = ring_zeros + _pairs(
                zeros_at, u, groups_left, R, GROUPS, PLANES, GROUP_PLANES, SLICE, TAIL
            )
    if PDL:
        gdc_wait()
    C: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 1, 32], [WR, WK, 1], [2, 1, 0])
    HELD: gl.constexpr = power_of_two(SLICE * PER_UNIT * NT)
    i4 = gl.arange(0, 128, gl.SliceLayout(0, gl.SliceLayout(1, C)))[None, None, :]
    w4 = gl.arange(0, WK, gl.SliceLayout(0, gl.SliceLayout(2, C)))[None, :, None]
    which = gl.arange(0, HELD, gl.SliceLayout(1, gl.SliceLayout(2, C)))[:, None, None]
    held = gl.allocate_shared_memory(gl.int32, [HELD, WK, 128], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
    if NARROW:
        in_block = i4 // 4 % 4 * 2 + i4 % 2 + i4 // 2 % 2 * 8
    else:
        in_block = i4 % 16
    row = gl.minimum(which % NT * 8 + i4 // 16, M - 1)
    k = (part_here * WK + w4) * (SLICE * PER_UNIT) + which // NT
    mask = (which < SLICE * PER_UNIT * NT) & (k < BLOCKS) & (i4 >= 0)
    load_async(held, x + row * stride + k * 16 + in_block, mask=mask)
    async_copy.commit_group()
    async_copy.wait_group(0)
    held_sums = gl.allocate_shared_memory(
        gl.float32, [WK, XB, RB], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    )
    L3: gl.constexpr = gl.BlockedLayout(
        [1, 1, 1], [1, 2, 16] if RB == 16 else [1, 1, 32], [1, WK * WR, 1], [2, 1, 0]
    )
    none = gl.zeros([T, 4], gl.float32, P)
    pairs = gl.zeros([T, 4], gl.int32, P)
    barrier()
    for block in range(begin, TILES, step):
        at += step.to(gl.int64) * (RB // 16 * UNITS * WORDS * 128)
        scales_at += step * (RB // 16 * GROUPS * 8)
        zeros_at += step * (RB // 16 * GROUPS * 8)
        more = block + step < TILES
        units_next = gl.where(more, units_left, 0)
        groups_next = gl.where(more, groups_left, 0)
        total = ()
        for _ in gl.static_range(R * NT):
            total = total + (none,)
        part = total
        minus = ()
        xs = _staged(held, 0, P, NT, WR, WK)
        for u in gl.static_range(SLICE):
            for i in gl.static_range(PER_UNIT):
                here = xs
                if u * PER_UNIT + i + 1 < SLICE * PER_UNIT:
                    xs = _staged(held, u * PER_UNIT + i + 1, P, NT, WR, WK)
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
                        part,
                        ring,
                        minus,
                        here,
                        none,
                        i,
                        begins(u * PLANES + 2 * i, SLICE * PLANES, GROUP_PLANES),
                        R,
                        NT,
                        BITS,
                        BF16,
                    )
                    if begins(u * PLANES + 2 * i + 2, SLICE * PLANES, GROUP_PLANES):
                        total = _added(part, total, ring_scales, pairs, R, NT)
                        ring_scales = ring_scales[R:]
                        if HAS_ZERO:
                            ring_zeros = ring_zeros[R:]
            ring = ring[R * WORDS :]
            for r in gl.static_range(R):
                ring = ring + _unit(at + r * (UNITS * WORDS * 128), u, units_next, WORDS, True)
            ring_scales = ring_scales + _pairs(
                scales_at, u, groups_next, R, GROUPS, PLANES, GROUP_PLANES, SLICE, True
            )
            if HAS_ZERO:
                ring_zeros = ring_zeros + _pairs(
                    zeros_at,
                    u,
                    groups_next,
                    R,
                    GROUPS,
                    PLANES,
                    GROUP_PLANES,
                    SLICE,
                    True,
                )
        held_sums.store(_stacked(total, WR, WK, R, NT))
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
            to = sums + block.to(gl.int64) * (PARTS * XB * RB) + i[:, None] * RB + j[None, :]
            gl.store(to + part_here * (XB * RB), out)
            barrier()  # all of this program's sums are written before it reports
            if gl.atomic_add(arrived + block, 1, sem="acq_rel") == PARTS - 1:
                barrier()
                all_parts = gl.load(to, cache_modifier=".cg")
                for q in gl.static_range(1, PARTS):
                    all_parts += gl.load(to + q * (XB * RB), cache_modifier=".cg")
                gl.store(arrived + block, 0)
                _ended(
                    all_parts, block, M, N, bias, y, position, after, gain, squares, normed, y_stride,
                    after_stride, times, scale, unscale, inverse, epsilon, RB, XB, WK * WR, L, HAS_BIAS, END,
                    COUNT, HAS_POSITION,
                )  # fmt: skip
        else:
            _ended(
                out, block, M, N, bias, y, position, after, gain, squares, normed, y_stride, after_stride, times,
                scale, unscale, inverse, epsilon, RB, XB, WK * WR, L, HAS_BIAS, END, COUNT, HAS_POSITION,
            )  # fmt: skip
