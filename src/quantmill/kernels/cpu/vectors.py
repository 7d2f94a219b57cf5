"""Sixteen lanes at a time: the vector instructions our kernels are written in, as LLVM IR.

Plain LLVM vector code, which the compiler fits to the processor; only `dots.py` names instructions.
Addresses are int64 values. Knows no layout.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from quantmill.kernels.cpu.jit import cgutils

LANES = 16
I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
I8x16, I8x32, I8x64 = (ir.VectorType(I8, n) for n in (16, 32, 64))
I16x16, I16x32, I16x64 = (ir.VectorType(I16, n) for n in (16, 32, 64))
I32x8, I32x16 = (ir.VectorType(I32, n) for n in (8, 16))
F16x16, F32x16 = ir.VectorType(F16, LANES), ir.VectorType(F32, LANES)

Value = Any  # an LLVM value; llvmlite has no types


class Vectors:
    """A thin layer over an IRBuilder; every method emits code where the builder stands."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.builder = builder

    def int64(self, value: int) -> Value:
        return ir.Constant(I64, value)

    def constant(self, kind: ir.VectorType, value: float) -> Value:
        """A vector with the same constant in every lane."""
        return ir.Constant(kind, [value] * kind.count)

    def offset(self, address: Value, index: Value, stride: int, extra: int = 0) -> Value:
        """address + index * stride + extra, in bytes."""
        moved = self.builder.add(address, self.builder.mul(index, self.int64(stride)))
        return self.builder.add(moved, self.int64(extra)) if extra else moved

    def load(self, address: Value, kind: ir.Type, align: int) -> Value:
        loaded = self.builder.load(self.builder.inttoptr(address, kind.as_pointer()))
        loaded.align = align
        return loaded

    def store(self, value: Value, address: Value, align: int) -> None:
        stored = self.builder.store(value, self.builder.inttoptr(address, value.type.as_pointer()))
        stored.align = align

    def splat(self, value: Value, count: int = LANES) -> Value:
        """One scalar in every lane."""
        kind = ir.VectorType(value.type, count)
        single = self.builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
        return self.shuffle(single, [0] * count)

    def load_splat(self, address: Value, kind: ir.Type) -> Value:
        return self.splat(self.load(address, kind, 4))

    def shuffle(self, vector: Value, lanes: list[int], other: Value | None = None) -> Value:
        second = ir.Constant(vector.type, ir.Undefined) if other is None else other
        mask = ir.Constant(ir.VectorType(I32, len(lanes)), lanes)
        return self.builder.shuffle_vector(vector, second, mask)

    def halves(self, vector: Value) -> tuple[Value, Value]:
        count = vector.type.count
        return (
            self.shuffle(vector, list(range(count // 2))),
            self.shuffle(vector, list(range(count // 2, count))),
        )

    def join(self, low: Value, high: Value) -> Value:
        return self.shuffle(low, list(range(2 * low.type.count)), high)

    def call(self, name: str, result: ir.Type, *arguments: Value) -> Value:
        """Call an LLVM intrinsic by its full name."""
        kind = ir.FunctionType(result, [a.type for a in arguments])
        function = cgutils.get_or_insert_function(self.builder.module, kind, name)
        return self.builder.call(function, list(arguments))

    def muladd(self, a: Value, b: Value, c: Value) -> Value:
        """a * b + c, fused where the processor can."""
        suffix = f"v{a.type.count}f32" if isinstance(a.type, ir.VectorType) else "f32"
        return self.call(f"llvm.fmuladd.{suffix}", a.type, a, b, c)

    def bits_at(self, vector: Value, shift: int, mask: int) -> Value:
        """(vector >> shift) & mask on 64 bytes; a negative shift goes left. The mask must hide what bytes
        shift into their neighbours."""
        if shift:
            wide = self.builder.bitcast(vector, I16x32)
            move = self.builder.lshr if shift > 0 else self.builder.shl
            vector = self.builder.bitcast(move(wide, self.constant(I16x32, abs(shift))), I8x64)
        return self.builder.and_(vector, self.constant(I8x64, mask))

    def variable(self, kind: ir.Type) -> Value:
        """A mutable slot (LLVM keeps it in a register); starts undefined."""
        return cgutils.alloca_once(self.builder, kind)

    def half_to_float(self, halves: Value, native: bool) -> Value:
        """16 float16 (given as int16 bits) -> 16 float32. Without hardware help: finite values only."""
        b = self.builder
        if native:
            return b.fpext(b.bitcast(halves, F16x16), F32x16)
        wide = b.zext(halves, I32x16)
        magnitude = b.shl(b.and_(wide, self.constant(I32x16, 0x7FFF)), self.constant(I32x16, 13))
        sign = b.shl(b.and_(wide, self.constant(I32x16, 0x8000)), self.constant(I32x16, 16))
        scaled = b.fmul(b.bitcast(magnitude, F32x16), self.constant(F32x16, 2.0**112))
        return b.bitcast(b.or_(b.bitcast(scaled, I32x16), sign), F32x16)

    def sum_lanes(self, vector: Value) -> Value:
        """Pairwise sum of all lanes: the same order on every processor."""
        while vector.type.count > 1:
            low, high = self.halves(vector)
            add = self.builder.fadd if vector.type.element == F32 else self.builder.add
            vector = add(low, high)
        return self.builder.extract_element(vector, ir.Constant(I32, 0))

    def max_lanes(self, vector: Value) -> Value:
        while vector.type.count > 1:
            vector = self.maximum(*self.halves(vector))
        return self.builder.extract_element(vector, ir.Constant(I32, 0))

    def maximum(self, a: Value, b: Value) -> Value:
        return self.builder.select(self.builder.fcmp_ordered(">", a, b), a, b)

    def absolute(self, vector: Value) -> Value:
        return self.call("llvm.fabs.v16f32", F32x16, vector)
