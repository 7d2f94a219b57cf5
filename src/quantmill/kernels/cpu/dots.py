"""Codes out of 64-byte lines, and the dot product of bytes: one row per instruction set.

A dot product takes 16 lanes of 4 unsigned codes and 16 lanes of 4 signed activations in [-127, 127] and
adds their 4 products to 16 int32 lanes, exactly. A slice of 32 columns by 16 rows is `bits` lines; `words`
yields its eight vectors of codes: word j, lane n, byte c is the code of row n, column 4 j + c.
"""

from __future__ import annotations

from collections.abc import Callable

from quantmill.kernels.cpu.vectors import (
    I8x64,
    I16x16,
    I16x32,
    I16x64,
    I32x8,
    I32x16,
    Value,
    Vectors,
)

SLICE = 32  # columns
WORDS = SLICE // 4
LINE = 64  # bytes


def words(v: Vectors, bits: int, address: Value) -> list[Value]:
    """The eight code vectors (64 x uint8) of the slice whose lines begin at `address`."""
    lines = [v.load(v.builder.add(address, v.int64(LINE * i)), I8x64, LINE) for i in range(bits)]
    return [_UNPACK[bits](v, lines, j) for j in range(WORDS)]


def _word_8(v: Vectors, lines: list[Value], j: int) -> Value:
    return lines[j]


def _word_4(v: Vectors, lines: list[Value], j: int) -> Value:
    return v.bits_at(lines[j // 2], 4 * (j % 2), 0x0F)


def _word_2(v: Vectors, lines: list[Value], j: int) -> Value:
    return v.bits_at(lines[j // 4], 2 * (j % 4), 0x03)


def _word_3(v: Vectors, lines: list[Value], j: int) -> Value:
    # Two lines of low bits as for 2 bits, then one line of high bits: bit j of each byte belongs to word j.
    return v.builder.or_(_word_2(v, lines, j), v.bits_at(lines[2], j - 2, 0x04))


_UNPACK: dict[int, Callable[[Vectors, list[Value], int], Value]] = {
    2: _word_2,
    3: _word_3,
    4: _word_4,
    8: _word_8,
}


def dot(v: Vectors, isa: str, bits: int, total: Value, codes: Value, activations: Value) -> Value:
    """total (16 x int32) + the dot products of `codes` (64 x uint8) and `activations` (64 x int8)."""
    return _DOTS[isa](v, bits, total, codes, activations)


def _dot_avx512vnni(v: Vectors, bits: int, total: Value, codes: Value, activations: Value) -> Value:
    b = v.builder
    operands = b.bitcast(codes, I32x16), b.bitcast(activations, I32x16)
    return v.call("llvm.x86.avx512.vpdpbusd.512", I32x16, total, *operands)


def _dot_avxvnni(v: Vectors, bits: int, total: Value, codes: Value, activations: Value) -> Value:
    b = v.builder
    operands = (total, b.bitcast(codes, I32x16), b.bitcast(activations, I32x16))
    pairs = zip(*(v.halves(o) for o in operands), strict=True)
    return v.join(*(v.call("llvm.x86.avx512.vpdpbusd.256", I32x8, *parts) for parts in pairs))


def _dot_avx2(v: Vectors, bits: int, total: Value, codes: Value, activations: Value) -> Value:
    if bits <= 4:
        return v.builder.add(total, _pairs_avx2(v, codes, activations, 1))
    # Two products of 8-bit codes overflow the instruction's int16 sums: nibble by nibble.
    low = _pairs_avx2(v, v.bits_at(codes, 0, 0x0F), activations, 1)
    high = _pairs_avx2(v, v.bits_at(codes, 4, 0x0F), activations, 16)
    return v.builder.add(total, v.builder.add(low, high))


def _pairs_avx2(v: Vectors, codes: Value, activations: Value, weight: int) -> Value:
    sums = []
    for c, a in zip(v.halves(codes), v.halves(activations), strict=True):
        pairs = v.call("llvm.x86.avx2.pmadd.ub.sw", I16x16, c, a)
        sums.append(v.call("llvm.x86.avx2.pmadd.wd", I32x8, pairs, v.constant(I16x16, weight)))
    return v.join(*sums)


def _dot_portable(v: Vectors, bits: int, total: Value, codes: Value, activations: Value) -> Value:
    # 255 * 127 fits an int16; the sums are widened pair by pair.
    b = v.builder
    products = b.mul(b.zext(codes, I16x64), b.sext(activations, I16x64))
    even, odd = (v.shuffle(products, list(range(start, 64, 2))) for start in (0, 1))
    pairs = b.add(b.sext(even, _wide(I16x32)), b.sext(odd, _wide(I16x32)))
    even, odd = (v.shuffle(pairs, list(range(start, 32, 2))) for start in (0, 1))
    return b.add(total, b.add(even, odd))


def _wide(kind: Value) -> Value:
    from llvmlite import ir

    return ir.VectorType(ir.IntType(32), kind.count)


_DOTS: dict[str, Callable[[Vectors, int, Value, Value, Value], Value]] = {
    "avx512vnni": _dot_avx512vnni,
    "avxvnni": _dot_avxvnni,
    "avx2": _dot_avx2,
    "portable": _dot_portable,
}
