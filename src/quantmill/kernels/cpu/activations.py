"""Activations as the products read them: gathered into the linear's column order, in tiles.

A tile of T rows is (slices, T, 32) values of `Precision` bytes (INT16: 32 high bytes, then 32 low ones);
beside it (slices, T) float32 scales, of no use where EXACT, and (slices, T) shifts, zero * sum(x): int32 of
the integers or float32, `zero` being the descriptor's FIELD_ZERO. Rows are cut into tiles of 8, then 4, 2, 1,
exactly as `products.py` consumes them.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from quantmill.kernels.cpu.jit import VOID, cgutils, inlined, intrinsic
from quantmill.kernels.cpu.layout import FIELD_COLUMNS, FIELD_SLICES, FIELD_ZERO, SLICE
from quantmill.kernels.cpu.memory import field
from quantmill.kernels.cpu.vectors import F32, F32x16, I8x16, I32x16, Value, Vectors

ROUND = 1.5 * 2.0**23  # adding and subtracting it rounds a small float32 to the nearest integer
TINY = 1e-30  # slices whose largest value is below count as zero
LIMIT = 127.0


@inlined
def tile_of(row: int, rows: int) -> tuple[int, int]:
    """First row and size of the tile that `row` of `rows` belongs to."""
    begin = row & ~7
    if begin + 8 <= rows:
        return begin, 8
    left = rows - begin
    for size in (4, 2, 1):
        if left & size:
            if row < begin + size:
                return begin, size
            begin += size
    return row, 1


@inlined
def prepare(
    width: int, linear: int, source: int, row: int, rows: int, x: int, scales: int, shifts: int
) -> None:
    """Lay down one row: `source` is its float32 values; `x`, `scales`, `shifts` are all rows'."""
    slices = field(linear, FIELD_SLICES)
    columns = field(linear, FIELD_COLUMNS)
    zero = field(linear, FIELD_ZERO)
    begin, size = tile_of(row, rows)
    m = row - begin
    targets = (
        x + (begin * slices + m) * 32 * width,
        scales + (begin * slices + m) * 4,
        shifts + (begin * slices + m) * 4,
    )
    if columns == 0:
        _lay(width, False, (source, columns, slices, zero, size), targets)
    else:
        _lay(width, True, (source, columns, slices, zero, size), targets)


@intrinsic
def _lay(context: Any, width: Any, gathered: Any, given: Any, targets: Any) -> Any:
    def emit(c: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        source, columns, slices, zero, size = cgutils.unpack_tuple(builder, arguments[2])
        v = Vectors(builder)
        with cgutils.for_range(builder, slices) as loop:
            if gathered.literal_value:
                values = _gather(v, source, v.offset(columns, loop.index, 4 * SLICE))
            else:
                values = [v.load(v.offset(source, loop.index, 4 * SLICE, 64 * h), F32x16, 4) for h in (0, 1)]
            place = builder.mul(loop.index, size)
            out, scales, shifts = cgutils.unpack_tuple(builder, arguments[3])
            _LAYS[width.literal_value](v, values, zero, place, out, scales, shifts)
        return c.get_dummy_value()

    return VOID(width, gathered, given, targets), emit


def _gather(v: Vectors, source: Value, columns: Value) -> list[Value]:
    b = v.builder
    base = b.inttoptr(source, F32.as_pointer())
    values = []
    for half in (0, 64):
        index = v.load(b.add(columns, v.int64(half)), I32x16, 4)
        present = b.icmp_signed(">=", index, v.constant(I32x16, 0))
        values.append(_masked_gather(v, base, index, present))
    return values


def _masked_gather(v: Vectors, base: Value, index: Value, present: Value) -> Value:
    # A lane without a column reads element 0 and is then cleared: no lane may touch memory outside the row.
    b = v.builder
    safe = b.select(present, index, v.constant(I32x16, 0))
    gathered = ir.Constant(F32x16, ir.Undefined)
    for lane in range(16):
        at = b.extract_element(safe, ir.Constant(ir.IntType(32), lane))
        value = b.load(b.gep(base, [b.sext(at, ir.IntType(64))]))
        gathered = b.insert_element(gathered, value, ir.Constant(ir.IntType(32), lane))
    return b.select(present, gathered, v.constant(F32x16, 0.0))


def _lay_int8(
    v: Vectors, values: list[Value], zero: Value, place: Value, out: Value, scales: Value, shifts: Value
) -> None:
    b = v.builder
    inverse = _store_scale(v, values, v.offset(scales, place, 4), 1 / LIMIT)
    codes = []
    for half, value in enumerate(values):
        codes.append(b.fptosi(_rounded(v, b.fmul(value, inverse)), I32x16))
        v.store(b.trunc(codes[half], I8x16), v.offset(out, place, SLICE, 16 * half), 4)
    _store_shift(v, b.add(*codes), zero, v.offset(shifts, place, 4))


def _lay_int16(
    v: Vectors, values: list[Value], zero: Value, place: Value, out: Value, scales: Value, shifts: Value
) -> None:
    """32 codes, then 32 codes of what their rounding left, in 256ths of the step."""
    b = v.builder
    inverse = _store_scale(v, values, v.offset(scales, place, 4), 1 / (256 * LIMIT))
    whole = []
    for half, value in enumerate(values):
        scaled = b.fmul(value, inverse)
        coarse = _rounded(v, scaled)
        rest = _rounded(v, b.fmul(b.fsub(scaled, coarse), v.constant(F32x16, 256.0)))
        limit = v.constant(F32x16, LIMIT)  # half a step would be 128
        rest = b.select(b.fcmp_ordered("<", rest, limit), rest, limit)
        rest = b.select(b.fcmp_ordered(">", rest, b.fneg(limit)), rest, b.fneg(limit))
        high, low = b.fptosi(coarse, I32x16), b.fptosi(rest, I32x16)
        v.store(b.trunc(high, I8x16), v.offset(out, place, 2 * SLICE, 16 * half), 4)
        v.store(b.trunc(low, I8x16), v.offset(out, place, 2 * SLICE, SLICE + 16 * half), 4)
        whole.append(b.add(b.shl(high, v.constant(I32x16, 8)), low))
    _store_shift(v, b.add(*whole), zero, v.offset(shifts, place, 4))


def _lay_exact(
    v: Vectors, values: list[Value], zero: Value, place: Value, out: Value, scales: Value, shifts: Value
) -> None:
    b = v.builder
    for half, value in enumerate(values):
        v.store(value, v.offset(out, place, 4 * SLICE, 64 * half), 4)
    total = v.sum_lanes(b.fadd(*values))
    v.store(b.fmul(total, b.sitofp(zero, F32)), v.offset(shifts, place, 4), 4)


def _store_scale(v: Vectors, values: list[Value], address: Value, unit: float) -> Value:
    """Store largest * unit; returns 127 / largest in every lane, 0 where there is nothing to scale."""
    b = v.builder
    largest = v.max_lanes(v.maximum(*(v.absolute(value) for value in values)))
    v.store(b.fmul(largest, ir.Constant(F32, unit)), address, 4)
    useful = b.fcmp_ordered(">", largest, ir.Constant(F32, TINY))
    return v.splat(b.select(useful, b.fdiv(ir.Constant(F32, LIMIT), largest), ir.Constant(F32, 0.0)))


def _rounded(v: Vectors, value: Value) -> Value:
    magic = v.constant(F32x16, ROUND)
    return v.builder.fsub(v.builder.fadd(value, magic), magic)


def _store_shift(v: Vectors, codes: Value, zero: Value, address: Value) -> None:
    total = v.sum_lanes(codes)
    v.store(v.builder.mul(total, v.builder.trunc(zero, total.type)), address, 4)


_LAYS = {1: _lay_int8, 2: _lay_int16, 4: _lay_exact}  # by Precision
