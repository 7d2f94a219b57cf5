"""Words of codes -> small exact numbers, and the other way: the two inner steps of every kernel here.

A code is never converted. Or-ed into the mantissa of a power of two it *is* a float, 1024 + code in fp16,
128 + code in bf16 (the "magic number" of Kim et al., arXiv 2211.10017), and one exact multiply-add takes the
power and the middle of the code's range away. A code may lie anywhere in the mantissa, which saves most of
the shifts. On a GPU each step runs on two codes at once (`lop3`, `fma.*x2`: compute capability 8.0 and up);
the same in plain Triton is what the interpreter runs. packing.py says which codes share a word. Knows no tensor.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def planes_of(bits):
    """Codes that one tile holds for each of its 16-bit places: three words hold 16 codes of 3 bits."""
    return 16 if bits == 3 else 16 // bits


@triton.constexpr_function
def words_of(bits):
    """16-bit words that hold them."""
    return 3 if bits == 3 else 1


@triton.constexpr_function
def shift_of(at, bits, bf16):
    """The fewest bits by which a word with a code at bit `at` has to move for the mantissa to hold it.

    The same for as many neighbours as possible, so that they share the shift.
    """
    room, base = (7 if bf16 else 10), 0
    for place in range(0, at + 1, bits):
        if place + bits - base > room:
            base = place
    return base


@triton.constexpr_function
def to_float_asm(place, bits, bf16):
    """PTX that takes the middle and the power of two away: t holds two codes at bit `place` of a mantissa."""
    import struct

    def pair(value):
        if bf16:
            half = struct.unpack("<I", struct.pack("<f", value))[0] >> 16
        else:
            half = struct.unpack("<H", struct.pack("<e", value))[0]
        return f"0x{half << 16 | half:08x}"

    power = 2.0**place
    minus = -((128.0 if bf16 else 1024.0) / power + 2 ** (bits - 1))
    kind = "bf16x2" if bf16 else "f16x2"
    return f"mov.b32 m, {pair(1 / power)}; mov.b32 c, {pair(minus)}; fma.rn.{kind} $0, t, m, c;"


@triton.constexpr_function
def code_asm(shift, place, bits, bf16):
    """PTX for two words at once: the codes at bits shift + place as floats less 2**(bits - 1)."""
    mask = ((1 << bits) - 1) << place
    one = 0x4300 if bf16 else 0x6400
    move = f"shr.u32 t, $1, {shift};" if shift else "mov.b32 t, $1;"
    keep = f"lop3.b32 t, t, 0x{mask << 16 | mask:08x}, 0x{one << 16 | one:08x}, 0xea;"  # (t & mask) | one
    return "{ .reg .b32 t, m, c; " + move + keep + to_float_asm(place, bits, bf16) + " }"


@triton.constexpr_function
def spread_asm(bf16):
    """PTX for two times three words: the 3-bit code made of their top bits, as a float less 4."""
    one = 0x4300 if bf16 else 0x6400
    steps = (
        "shr.u32 t, $1, 15; shr.u32 m, $2, 14; shr.u32 c, $3, 13;"
        "and.b32 t, t, 0x00010001;"
        "lop3.b32 t, m, 0x00020002, t, 0xea;"
        "lop3.b32 t, c, 0x00040004, t, 0xea;"
        f"or.b32 t, t, 0x{one << 16 | one:08x};"
    )
    return "{ .reg .b32 t, m, c; " + steps + to_float_asm(0, 3, bf16) + " }"


@triton.jit
def _less_middle(mantissa, PLACE: tl.constexpr, BITS: tl.constexpr, BF16: tl.constexpr):
    """16-bit mantissas with a code at bit PLACE -> the code less 2**(BITS - 1), as fp16 or bf16."""
    POWER: tl.constexpr = 1.0 / (1 << PLACE)
    if BF16:
        value = (mantissa | 0x4300).to(tl.bfloat16, bitcast=True).to(tl.float32)
        less = (value * POWER - (128.0 * POWER + (1 << (BITS - 1)))).to(tl.bfloat16)
    else:
        value = (mantissa | 0x6400).to(tl.float16, bitcast=True).to(tl.float32)
        less = (value * POWER - (1024.0 * POWER + (1 << (BITS - 1)))).to(tl.float16)
    return less


@triton.jit
def _code(word, AT: tl.constexpr, BITS: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr):
    """The code at bits [AT, AT + BITS) of every word (int16) as a float less 2**(BITS - 1)."""
    SHIFT: tl.constexpr = shift_of(AT, BITS, BF16)
    PLACE: tl.constexpr = AT - SHIFT
    PTX: tl.constexpr = code_asm(SHIFT, PLACE, BITS, BF16)
    if not ASM:
        mantissa = (word.to(tl.uint16, bitcast=True) >> SHIFT) & (((1 << BITS) - 1) << PLACE)
        value = _less_middle(mantissa, PLACE, BITS, BF16)
    elif BF16:
        value = tl.inline_asm_elementwise(PTX, "=r,r", [word], dtype=tl.bfloat16, is_pure=True, pack=2)
    else:
        value = tl.inline_asm_elementwise(PTX, "=r,r", [word], dtype=tl.float16, is_pure=True, pack=2)
    return value


@triton.jit
def _spread(a, b, c, BF16: tl.constexpr, ASM: tl.constexpr):
    """The 3-bit code whose bits are the top bits of three words, less 4."""
    PTX: tl.constexpr = spread_asm(BF16)
    if not ASM:
        low = (a.to(tl.uint16, bitcast=True) >> 15) & 1
        middle = (b.to(tl.uint16, bitcast=True) >> 14) & 2
        high = (c.to(tl.uint16, bitcast=True) >> 13) & 4
        value = _less_middle(low | middle | high, 0, 3, BF16)
    elif BF16:
        value = tl.inline_asm_elementwise(PTX, "=r,r,r,r", [a, b, c], dtype=tl.bfloat16, is_pure=True, pack=2)
    else:
        value = tl.inline_asm_elementwise(PTX, "=r,r,r,r", [a, b, c], dtype=tl.float16, is_pure=True, pack=2)
    return value


@triton.jit
def plane(a, b, c, PLANE: tl.constexpr, BITS: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr):
    """Plane PLANE of a tile's words (rows, places) int16 as floats less 2**(BITS - 1). b and c: 3 bits only."""
    if BITS == 3:
        if PLANE == 15:
            value = _spread(a, b, c, BF16, ASM)
        elif PLANE < 5:
            value = _code(a, 3 * PLANE, 3, BF16, ASM)
        elif PLANE < 10:
            value = _code(b, 3 * PLANE - 15, 3, BF16, ASM)
        else:
            value = _code(c, 3 * PLANE - 30, 3, BF16, ASM)
    elif BITS == 8 and BF16:  # 128 + code does not fit seven bits of mantissa
        value = _code(a, 8 * PLANE, 8, False, ASM).to(tl.bfloat16)
    else:
        value = _code(a, BITS * PLANE, BITS, BF16, ASM)
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
