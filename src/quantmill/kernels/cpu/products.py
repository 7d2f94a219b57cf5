"""The compiled product of a packed linear with prepared activations, one C function per kind of linear.

`product(isa, bits, asym, precision)` compiles (or loads from numba's cache) the function

    f(linear, x, scales, shifts, rows, first, last, start, start_stride, out, out_stride)      all int64

that computes blocks `first` to `last` of 16 output rows for `rows` activations. `linear` points at a
descriptor (`layout.py`), `x`, `scales` and `shifts` at what `activations.py` prepared; `out[r, n] =
start[r, n] + W x`, fp32, strides in bytes. Knows no threads.

INT8, INT16: codes times bytes in int32 per slice of 32 columns, exact; zero points enter as the starting
value `shift` = -zero * sum(x) of the slice; then fp32 with the slice's activation scale and the group's
weight scale. EXACT: fp32 activations, codes (or float16 weights) made fp32 in registers, the same shifts in
fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, reduce
from typing import Any

from llvmlite import ir

from quantmill.kernels.cpu import dots
from quantmill.kernels.cpu.jit import VOID, built_from, c_function, cgutils, fingerprint, intrinsic
from quantmill.kernels.cpu.layout import (
    DENSE,
    FIELD_FIRST_SLICE,
    FIELD_GROUPS,
    FIELD_SCALES,
    FIELD_SLICES,
    FIELD_WEIGHTS,
    FIELD_ZEROS,
    Precision,
)
from quantmill.kernels.cpu.memory import field
from quantmill.kernels.cpu.vectors import (
    F32,
    I8,
    I32,
    I64,
    F32x16,
    I8x16,
    I8x64,
    I16x16,
    I32x16,
    Value,
    Vectors,
)

# Bytes ahead of the weights in use that are fetched into the second-level cache (2): an eighth of what this call
# reads, within these limits. Far is good for a memory that answers slowly, and reaches across pages, which the
# processor's own prefetcher does not cross (5 to 20 % on Mistral's shapes); beyond the call's end it is waste.
NEAREST, FARTHEST = 1024, 16384


@dataclass(frozen=True, slots=True)
class _Kind:
    """What a block of code is emitted for."""

    isa: str
    bits: int
    rows: int  # activations in the tile
    asym: bool
    precision: int

    @property
    def unrolled(self) -> bool:
        """Whether the tile's sums fit the registers: 32 of 64 bytes do, 16 of 32 bytes do not."""
        return self.isa == "avx512vnni" or self.rows == 1

    def chains(self, together: int) -> int:
        """Independent sums per activation, so that a single one does not wait for its own last addition.

        Sums of integers are exact, so that their number may depend on the tile; those of floats must not, or
        a batch would change bits.
        """
        if self.precision == Precision.EXACT:
            return 2
        return 2 if self.precision == Precision.INT8 and together == 1 else 1


@intrinsic
def _block(
    context: Any, isa: Any, bits: Any, rows: Any, asym: Any, precision: Any, pointers: Any, strides: Any
) -> Any:
    """16 output rows by `rows` activations. pointers: weights, scales, zeros, first_slice, groups, x, x
    scales,
    x shifts, start, out; strides: start, out, and how far ahead weights are fetched."""
    literals = (isa, bits, rows, asym, precision)
    kind = _Kind(*(a.literal_value for a in literals))

    def emit(c: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        values = [cgutils.unpack_tuple(builder, a) for a in arguments[5:]]
        _Block(Vectors(builder), kind, *values[0], *values[1]).emit()
        return c.get_dummy_value()

    return VOID(*literals, pointers, strides), emit


class _Block:
    """Emits the loops: groups, slices in a group, words in a slice, activations in the tile."""

    def __init__(self, v: Vectors, kind: _Kind, *addresses: Value) -> None:
        self.v, self.kind = v, kind
        (self.weights, self.scales, self.zeros, self.first_slice, self.groups) = addresses[:5]
        (self.x, self.x_scales, self.x_shifts, self.start, self.out) = addresses[5:10]
        self.start_stride, self.out_stride, self.ahead = addresses[10:]
        tile = ir.ArrayType(F32x16, kind.rows)
        self.totals, self.sums = v.variable(tile), v.variable(tile)  # whole linear; this group

    def emit(self) -> None:
        v, b = self.v, self.v.builder
        with self._activations() as rows:
            for m in rows:
                begin = b.add(self.start, b.mul(self.start_stride, m))
                b.store(v.load(begin, F32x16, 4), self._at(self.totals, m))
        with cgutils.for_range(b, self.groups) as group:
            self._group(group.index)
        with self._activations() as rows:
            for m in rows:
                place = b.add(self.out, b.mul(self.out_stride, m))
                v.store(b.load(self._at(self.totals, m)), place, 4)

    def _group(self, group: Value) -> None:
        v, b = self.v, self.v.builder
        with self._activations() as rows:
            for m in rows:
                b.store(v.constant(F32x16, 0.0), self._at(self.sums, m))
        zero = self._zero(group)
        with self._slices(group) as index:
            codes = self._codes(index)
            with self._activations() as rows:
                emit = self._slice_exact if self.kind.precision == Precision.EXACT else self._slice_integer
                emit(rows, index, codes, zero)
        native = self.kind.isa != "portable"
        scale = v.half_to_float(v.load(v.offset(self.scales, group, 32), I16x16, 32), native)
        with self._activations() as rows:
            for m in rows:
                total = self._at(self.totals, m)
                b.store(v.muladd(b.load(self._at(self.sums, m)), scale, b.load(total)), total)

    @contextmanager
    def _activations(self) -> Iterator[list[Value]]:
        """Row numbers in the tile: all at once, as constants, or one by one in a loop."""
        if self.kind.unrolled:
            yield [self.v.int64(m) for m in range(self.kind.rows)]
        else:
            with cgutils.for_range(self.v.builder, self.v.int64(self.kind.rows)) as loop:
                yield [loop.index]

    def _at(self, tile: Value, m: Value) -> Value:
        return self.v.builder.gep(tile, [self.v.int64(0), m])

    def _zero(self, group: Value) -> Value | None:
        """The group's zero points as 16 int32 (float32 where exact); None where symmetric."""
        v, b = self.v, self.v.builder
        if not self.kind.asym:
            return None
        wide = b.zext(v.load(v.offset(self.zeros, group, 16), I8x16, 16), I32x16)
        return b.sitofp(wide, F32x16) if self.kind.precision == Precision.EXACT else wide

    @contextmanager
    def _slices(self, group: Value) -> Iterator[Value]:
        v, b = self.v, self.v.builder
        begin, end = (b.sext(v.load(v.offset(self.first_slice, group, 4, e), I32, 4), I64) for e in (0, 4))
        with cgutils.for_range_slice(b, begin, end, v.int64(1)) as (index, _):
            yield index

    def _codes(self, index: Value) -> list[Value]:
        v = self.v
        lines = v.offset(self.weights, index, self.kind.bits * dots.LINE)
        for i in range(self.kind.bits):
            ahead = v.builder.add(v.builder.add(lines, self.ahead), v.int64(i * dots.LINE))
            pointer = v.builder.inttoptr(ahead, I8.as_pointer())
            v.call("llvm.prefetch.p0", ir.VoidType(), pointer, *(ir.Constant(I32, n) for n in (0, 2, 1)))
        if self.kind.bits == DENSE:
            return [v.load(v.builder.add(lines, v.int64(32 * k)), I16x16, 32) for k in range(dots.SLICE)]
        return dots.words(v, self.kind.bits, lines)

    def _weight(self, codes: list[Value], k: int) -> Value:
        """Column k of the slice as 16 float32: codes, still without zero and scale, or dense weights."""
        v, b = self.v, self.v.builder
        if self.kind.bits == DENSE:
            return v.half_to_float(codes[k], self.kind.isa != "portable")
        byte = b.lshr(b.bitcast(codes[k // 4], I32x16), v.constant(I32x16, 8 * (k % 4)))
        return b.sitofp(b.and_(byte, v.constant(I32x16, 255)), F32x16)

    def _of_row(self, base: Value, index: Value, m: Value, size: int, extra: int = 0) -> Value:
        """Address in an array (slices, rows) of `size` bytes."""
        v, b = self.v, self.v.builder
        place = b.add(b.mul(index, v.int64(self.kind.rows)), m)
        return v.offset(base, place, size, extra)

    def _slice_integer(self, rows: list[Value], index: Value, codes: list[Value], zero: Value | None) -> None:
        v, b, kind = self.v, self.v.builder, self.kind
        count, width = kind.chains(len(rows)), dots.SLICE * kind.precision
        for m in rows:
            shift = v.load_splat(self._of_row(self.x_shifts, index, m, 4), I32)
            zeros = v.constant(I32x16, 0)
            chains = [shift if zero is None else b.mul(shift, zero)] + [zeros] * (count - 1)
            highs = zeros
            for j, code in enumerate(codes):
                at = self._of_row(self.x, index, m, width, 4 * j)
                x = b.bitcast(v.load_splat(at, I32), I8x64)
                if kind.precision == Precision.INT16:  # high bytes first
                    highs = dots.dot(v, kind.isa, kind.bits, highs, code, x)
                    x = b.bitcast(v.load_splat(b.add(at, v.int64(dots.SLICE)), I32), I8x64)
                c = j % count
                chains[c] = dots.dot(v, kind.isa, kind.bits, chains[c], code, x)
            if kind.precision == Precision.INT16:
                chains.append(b.shl(highs, v.constant(I32x16, 8)))
            total = b.sitofp(reduce(b.add, chains), F32x16)
            scale = v.load_splat(self._of_row(self.x_scales, index, m, 4), F32)
            place = self._at(self.sums, m)
            b.store(v.muladd(total, scale, b.load(place)), place)

    def _slice_exact(self, rows: list[Value], index: Value, codes: list[Value], zero: Value | None) -> None:
        v, b, kind = self.v, self.v.builder, self.kind
        count = kind.chains(len(rows))
        chains = []
        for m in rows:
            shift = v.load_splat(self._of_row(self.x_shifts, index, m, 4), F32)
            first = b.fadd(b.load(self._at(self.sums, m)), shift if zero is None else b.fmul(shift, zero))
            chains.append([first] + [v.constant(F32x16, 0.0)] * (count - 1))
        for k in range(dots.SLICE):
            weight = self._weight(codes, k)
            for m, chain in zip(rows, chains, strict=True):
                x = v.load_splat(self._of_row(self.x, index, m, 4 * dots.SLICE, 4 * k), F32)
                chain[k % count] = v.muladd(weight, x, chain[k % count])
        for m, chain in zip(rows, chains, strict=True):
            b.store(reduce(b.fadd, chain), self._at(self.sums, m))


@cache
def product(isa: str, bits: int, asym: bool, precision: Precision) -> Any:
    """The C function described at the top of this module (`.address` is what descriptors hold)."""
    assert precision == Precision.EXACT or bits != DENSE, "dense weights take fp32 activations"
    stamp = fingerprint()
    width = int(precision)

    @c_function(11)
    def multiply(
        linear: int, x: int, scales: int, shifts: int, rows: int, first: int, last: int,
        start: int, start_stride: int, out: int, out_stride: int,
    ) -> None:  # fmt: skip
        built_from(stamp)
        slices = field(linear, FIELD_SLICES)
        groups = field(linear, FIELD_GROUPS)
        weights = field(linear, FIELD_WEIGHTS)
        weight_scales = field(linear, FIELD_SCALES)
        zeros = field(linear, FIELD_ZEROS)
        first_slice = field(linear, FIELD_FIRST_SLICE)
        ahead = min(FARTHEST, max(NEAREST, (last - first) * slices * bits * 8)) // 64 * 64
        strides = (start_stride, out_stride, ahead)
        for block in range(first, last):
            w = weights + block * slices * bits * 64
            s = weight_scales + block * groups * 32
            z = zeros + block * groups * 16
            row = 0
            while row < rows:
                left = rows - row
                done = row * slices
                p = (
                    w, s, z, first_slice, groups,
                    x + done * 32 * width, scales + done * 4, shifts + done * 4,
                    start + row * start_stride + block * 64, out + row * out_stride + block * 64,
                )  # fmt: skip
                if left >= 8:
                    _block(isa, bits, 8, asym, width, p, strides)
                    row += 8
                elif left >= 4:
                    _block(isa, bits, 4, asym, width, p, strides)
                    row += 4
                elif left >= 2:
                    _block(isa, bits, 2, asym, width, p, strides)
                    row += 2
                else:
                    _block(isa, bits, 1, asym, width, p, strides)
                    row += 1

    return multiply
