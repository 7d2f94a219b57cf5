"""Units of a tile -> weights in registers, and the kernel that writes them all: a dense copy. Gluon.

A thread holds the codes of 8 neighbouring columns of two rows, so it stores 16 bytes at once. Knows no tuning.
"""

from __future__ import annotations

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quantmill.kernels.triton.codes import pair, plane_ptx, planes, power, words_in


@triton.constexpr_function
def scaled_ptx(plane, bits, has_zero, bf16):
    """A plane's two codes times a scale, rounded once: $0 = (codes of $3 ... + $2) * $1, all registers of pairs.

    $1 and $2 (the middle less the zero point) are float16. For bfloat16 the product is rounded from float16, which
    has three bits more.
    """
    minus = pair(-(2.0 ** power(plane, bits, False) + 2 ** (bits - 1)), False)
    code = plane_ptx(plane, bits, False)
    for old, new in (("$4", "$5"), ("$3", "$4"), ("$2", "$3"), ("$1", "n"), ("$0", "v")):
        code = code.replace(old, new)
    less = "add.rn.f16x2 v, v, $2; " if has_zero else ""
    last = "mul.rn.f16x2 $0, v, $1; "
    if bf16:
        last = (
            "mul.rn.f16x2 v, v, $1; { .reg .b16 l, h; .reg .f32 a, b; mov.b32 {l, h}, v; "
            "cvt.f32.f16 a, l; cvt.f32.f16 b, h; cvt.rn.bf16x2.f32 $0, b, a; }"
        )
    return "{ .reg .b32 v, n; " + f"mov.b32 n, 0x{minus:08x}; " + code + less + last + "}"


@triton.constexpr_function
def columns_layout(warps, narrow):
    """Where the 32 columns of two planes lie: 16 rows a warp, 8 neighbouring columns a thread (narrow: 4 and 4)."""
    inside = [[0, 1], [0, 2], [0, 16] if narrow else [0, 4], [8, 0]]
    lanes = [[0, 4], [0, 8]] if narrow else [[0, 8], [0, 16]]
    up = [[16 << i, 0] for i in range(warps.bit_length() - 1)]
    return gl.DistributedLinearLayout(inside, [*lanes, [1, 0], [2, 0], [4, 0]], up, [], [warps * 16, 32])


@gluon.jit
def plane_of(
    a,
    b,
    c,
    scale,
    zero,
    PLANE: gl.constexpr,
    BITS: gl.constexpr,
    HAS_ZERO: gl.constexpr,
    BF16: gl.constexpr,
    WARPS: gl.constexpr,
):
    """One plane of the words (threads, 8) int16, times the scales -> (rows, quad, 4)."""
    PTX: gl.constexpr = scaled_ptx(PLANE, BITS, HAS_ZERO, BF16)
    if BF16:
        v = gl.inline_asm_elementwise(PTX, "=r,r,r,r,r,r", [scale, zero, a, b, c], gl.bfloat16, True, 2)
    else:
        v = gl.inline_asm_elementwise(PTX, "=r,r,r,r,r,r", [scale, zero, a, b, c], gl.float16, True, 2)
    v = gl.permute(
        gl.reshape(v, [WARPS, 8, 4, 2, 2, 2]), [0, 4, 1, 2, 3, 5]
    )  # warp, row half, g, quad, j, half
    return gl.reshape(v, [WARPS * 16, 4, 4])


@gluon.jit
def columns_of(first, second, WARPS: gl.constexpr, NARROW: gl.constexpr):
    """Two neighbouring planes -> (rows, 32)."""
    L: gl.constexpr = columns_layout(WARPS, NARROW)
    v = gl.join(first, second)  # rows, quad, column, plane
    v = gl.permute(v, [0, 3, 1, 2] if NARROW else [0, 1, 3, 2])
    return gl.convert_layout(gl.reshape(v, [WARPS * 16, 32]), L, assert_trivial=True)


@gluon.jit
def by_register(at, GROUP, WARPS: gl.constexpr, P: gl.constexpr):
    """A group's pairs, of rows g and g + 8 (float16), for every half of a plane's registers: (threads, 8) int16."""
    B: gl.constexpr = gl.BlockedLayout([1, 2, 2, 2], [32, 1, 1, 1], [WARPS, 1, 1, 1], [3, 2, 1, 0])
    wide = gl.expand_dims(gl.expand_dims(gl.load(at + GROUP * 16), 1), 3)
    wide = wide + gl.zeros([WARPS * 32, 2, 2, 2], gl.int16, B)
    return gl.convert_layout(gl.reshape(wide, [WARPS * 32, 8]), P, assert_trivial=True)


@gluon.jit
def pairs_at(base, tile, GROUPS, WARPS: gl.constexpr):
    """Pointers to the pairs of every thread's rows, of the first group. base (tiles, groups, 8, 2) int16."""
    B: gl.constexpr = gl.BlockedLayout([1, 2, 2, 2], [32, 1, 1, 1], [WARPS, 1, 1, 1], [3, 2, 1, 0])
    S: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, B))
    tid = gl.arange(0, WARPS * 32, gl.SliceLayout(1, S))
    at = base + ((tile + (tid >> 5)).to(gl.int64) * (GROUPS * 16) + ((tid & 31) >> 2) * 2)[:, None]
    return at + gl.arange(0, 2, gl.SliceLayout(0, S))[None, :]


@gluon.jit
def dense_kernel(
    words,  # (tiles, units, WORDS, 32, 8) int16
    scales,  # (tiles, groups, 8, 2) int16: float16
    zeros,  # the same; not read unless HAS_ZERO
    weight,  # (N, K) fp16 or bf16, in the order of the places, K of them
    N,
    K,
    units,
    groups,
    BITS: gl.constexpr,
    GROUP_PLANES: gl.constexpr,
    NARROW: gl.constexpr,
    HAS_ZERO: gl.constexpr,
    BF16: gl.constexpr,
    WARPS: gl.constexpr,
):
    """One program writes 16 * WARPS rows of one unit."""
    WORDS: gl.constexpr = words_in(BITS)
    P: gl.constexpr = gl.BlockedLayout([1, 8], [32, 1], [WARPS, 1], [1, 0])
    L: gl.constexpr = columns_layout(WARPS, NARROW)
    unit, block = gl.program_id(0), gl.program_id(1)
    tid = gl.arange(0, WARPS * 32, gl.SliceLayout(1, P))
    tile = (block * WARPS + (tid >> 5)).to(gl.int64)
    at = words + ((tile * units + unit) * (WORDS * 256) + (tid & 31) * 8)[:, None]
    at = at + gl.arange(0, 8, gl.SliceLayout(0, P))[None, :]
    a = gl.load(at, eviction_policy="evict_first")
    b, c = a, a
    if WORDS == 3:
        b = gl.load(at + 256, eviction_policy="evict_first")
        c = gl.load(at + 512, eviction_policy="evict_first")
    scales_at = pairs_at(scales, block * WARPS, groups, WARPS)
    zeros_at = pairs_at(zeros, block * WARPS, groups, WARPS)
    n = block * (WARPS * 16) + gl.arange(0, WARPS * 16, gl.SliceLayout(1, L))
    k = unit * (planes(BITS) * 16) + gl.arange(0, 32, gl.SliceLayout(0, L))
    to = weight + n.to(gl.int64)[:, None] * K + k[None, :]
    here = (n < N)[:, None]
    scale = by_register(scales_at, unit * planes(BITS) // GROUP_PLANES, WARPS, P)
    zero = scale
    if HAS_ZERO:
        zero = by_register(zeros_at, unit * planes(BITS) // GROUP_PLANES, WARPS, P)
    for i in gl.static_range(planes(BITS) // 2):
        if (2 * i) % GROUP_PLANES == 0 and i > 0:
            scale = by_register(scales_at, (unit * planes(BITS) + 2 * i) // GROUP_PLANES, WARPS, P)
            if HAS_ZERO:
                zero = by_register(zeros_at, (unit * planes(BITS) + 2 * i) // GROUP_PLANES, WARPS, P)
        first = plane_of(a, b, c, scale, zero, 2 * i, BITS, HAS_ZERO, BF16, WARPS)
        if GROUP_PLANES == 1:
            scale = by_register(scales_at, unit * planes(BITS) + 2 * i + 1, WARPS, P)
            if HAS_ZERO:
                zero = by_register(zeros_at, unit * planes(BITS) + 2 * i + 1, WARPS, P)
        second = plane_of(a, b, c, scale, zero, 2 * i + 1, BITS, HAS_ZERO, BF16, WARPS)
        both = columns_of(first, second, WARPS, NARROW)
        gl.store(to + i * 32, both, mask=here & (k + i * 32 < K)[None, :])
