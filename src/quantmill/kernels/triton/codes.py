"""Words of codes -> small exact numbers: the inner step of every kernel here, as PTX and in plain Triton.

A code is never converted. Or-ed into the mantissa of a power of two it *is* a float, 2**p + code (the "magic
number" of Kim et al., arXiv 2211.10017), and one exact addition takes the power and the zero point away. The power
is chosen so that a code may lie anywhere in the mantissa, which saves most of the shifts. Each step works on a
32-bit register, two codes at once: a word is two 16-bit halves that hold neighbouring codes at the same places.
packing.py says which codes share a word. Knows no tensor.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def mantissa(bf16):
    """Bits of a mantissa: what a code and its place have to fit into."""
    return 7 if bf16 else 10


@triton.constexpr_function
def planes(bits):
    """Codes that one half of a word holds (3 bits: of three words)."""
    return 16 if bits == 3 else 16 // bits


@triton.constexpr_function
def words_in(bits):
    """Words that hold them."""
    return 3 if bits == 3 else 1


@triton.constexpr_function
def place(plane, bits):
    """(word, lowest bit) of a plane's code; the sixteenth of 3 bits lies in the words' top bits: (-1, 0).

    3 bits: four planes a word, so that neighbours share one, and one more of the last four.
    """
    if bits != 3:
        return 0, bits * plane
    if plane == 15:
        return -1, 0
    return (plane // 4, plane % 4 * 3) if plane < 12 else (plane - 12, 12)


@triton.constexpr_function
def plane_at(word, code, bits):
    """The plane of a word's code 0, 1, 2 ...; not of the sixteenth of 3 bits."""
    if bits != 3:
        return code
    return 12 + word if code == 4 else 4 * word + code


@triton.constexpr_function
def shift(at, bits, bf16):
    """By how much a word has to move for the mantissa to hold the code at bit `at`.

    The same for as many neighbours as possible, so that they share the shift.
    """
    base = 0
    for low in range(0, at + 1, bits):
        if low + bits - base > mantissa(bf16):
            base = low
    return base


@triton.constexpr_function
def power(plane, bits, bf16):
    """log2 of the power of two that a plane's codes are added to."""
    if bits == 8:
        return 10
    _, at = place(plane, bits)
    return mantissa(bf16) - (at - shift(at, bits, bf16))


@triton.constexpr_function
def powers(bits, bf16):
    """Those of all planes, each once, in the order of the first plane that has it."""
    return tuple(dict.fromkeys(power(p, bits, bf16) for p in range(planes(bits))))


@triton.constexpr_function
def pair(value, bf16):
    """Two equal floats in one register."""
    import struct

    if bf16:
        half = struct.unpack("<I", struct.pack("<f", value))[0] >> 16
    else:
        half = struct.unpack("<H", struct.pack("<e", value))[0]
    return int(half << 16 | half)


@triton.constexpr_function
def _one(log2, bf16):
    return f"0x{pair(2.0**log2, bf16):08x}"


@triton.constexpr_function
def _added(bf16):
    """$0 = t + (the register that holds minus the power and the zero point), exact."""
    if bf16:  # an addition of pairs needs compute capability 9.0, a multiply-add 8.0
        return f"mov.b32 u, {_one(0, True)}; fma.rn.bf16x2 $0, t, u, $1;"
    return "add.rn.f16x2 $0, t, $1;"


# bf16 has no room for 8 bits and a power: subtract in fp16, exact, and convert, exact again.
_BYTES_BF16 = (
    "add.rn.f16x2 t, t, $1; { .reg .b16 l, h; .reg .f32 a, b; mov.b32 {l, h}, t; "
    "cvt.f32.f16 a, l; cvt.f32.f16 b, h; cvt.rn.bf16x2.f32 $0, b, a; }"
)


@triton.constexpr_function
def plane_ptx(plane, bits, bf16):
    """PTX of one plane: $0 its two codes less the zero point; $1 minus (power + zero point); $2 ... the words."""
    word, at = place(plane, bits)
    if bits == 8:
        low, high = (0, 2) if plane == 0 else (1, 3)
        spread = f"prmt.b32 t, $2, 0x64646464, 0x4{high}4{low};"
        return "{ .reg .b32 t, u; " + spread + (_BYTES_BF16 if bf16 else _added(False)) + " }"
    one = _one(power(plane, bits, bf16), bf16)
    if word < 0:
        keep = (
            "shr.u32 t, $2, 15; shr.u32 u, $3, 14; and.b32 t, t, 0x00010001; "
            "lop3.b32 t, u, 0x00020002, t, 0xea; shr.u32 u, $4, 13; lop3.b32 t, u, 0x00040004, t, 0xea; "
            f"or.b32 t, t, {one}; "
        )
        return "{ .reg .b32 t, u; " + keep + _added(bf16) + " }"
    by = shift(at, bits, bf16)
    mask = ((1 << bits) - 1) << (at - by)
    move = f"shr.u32 t, ${2 + word}, {by}; " if by else f"mov.b32 t, ${2 + word}; "
    keep = f"lop3.b32 t, t, 0x{mask << 16 | mask:08x}, {one}, 0xea; "  # (t & mask) | one
    return "{ .reg .b32 t, u; " + move + keep + _added(bf16) + " }"


@triton.constexpr_function
def class_of(plane, bits, bf16):
    """Which of `powers_of` a plane's codes are added to."""
    return powers(bits, bf16).index(power(plane, bits, bf16))


@triton.constexpr_function
def minus_pair(log2, bits, bf16):
    """The register minus (2**log2 + the middle of the codes' range), twice, as int32."""
    value = pair(-(2.0**log2 + 2 ** (bits - 1)), bf16 and bits != 8)
    return value - (1 << 32)


@triton.jit
def code(a, b, c, half, PLANE: tl.constexpr, BITS: tl.constexpr):
    """Plane PLANE's code in half `half` (0 or 1, a tensor) of words (int32), int32. b and c: 3 bits only."""
    WORD: tl.constexpr = place(PLANE, BITS)[0]
    AT: tl.constexpr = place(PLANE, BITS)[1]
    if WORD < 0:
        value = ((a >> (half * 16 + 15)) & 1) | ((b >> (half * 16 + 15)) & 1) << 1
        value = value | ((c >> (half * 16 + 15)) & 1) << 2
    elif WORD == 0:
        value = (a >> (half * 16 + AT)) & ((1 << BITS) - 1)
    elif WORD == 1:
        value = (b >> (half * 16 + AT)) & ((1 << BITS) - 1)
    else:
        value = (c >> (half * 16 + AT)) & ((1 << BITS) - 1)
    return value


@triton.jit
def stored_code(qweight, k, n, mask, N, BITS: tl.constexpr):
    """Code k of column n in a GPTQ stream (formats/bits.py), int32; 0 where the mask is off."""
    bit = k * BITS
    line = bit >> 5
    at = bit & 31
    low = tl.load(qweight + line * N + n, mask=mask, other=0)
    value = low.to(tl.uint32, bitcast=True) >> at.to(tl.uint32)
    if BITS == 3:
        over = at > 29
        high = tl.load(qweight + (line + 1) * N + n, mask=mask & over, other=0)
        moved = high.to(tl.uint32, bitcast=True) << ((32 - at) & 31).to(tl.uint32)
        value = tl.where(over, value | moved, value)
    return (value & ((1 << BITS) - 1)).to(tl.int32)
