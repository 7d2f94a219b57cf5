"""What a decoder does between its linears, sixteen floats at a time. Counts are multiples of 16.

Knows no model. Addresses are int64 values.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from quantmill.kernels.cpu.jit import F32 as FLOAT
from quantmill.kernels.cpu.jit import I64, VOID, cgutils, intrinsic
from quantmill.kernels.cpu.vectors import F32, F32x16, I32x16, Value, Vectors

LINE = 64  # bytes of 16 floats
ROUND = 1.5 * 2.0**23

# exp(r) = 1 + r + r^2 (1/2 + ...): minimax coefficients of the Cephes library's expf, highest power first.
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4


def exponential(v: Vectors, x: Value) -> Value:
    """exp of 16 floats to about 1e-7 relative, between exp(-87) and exp(88)."""
    b = v.builder
    low, high = v.constant(F32x16, -87.0), v.constant(F32x16, 88.0)
    x = b.select(b.fcmp_ordered(">", x, low), x, low)
    x = b.select(b.fcmp_ordered("<", x, high), x, high)
    magic = v.constant(F32x16, ROUND)
    n = b.fsub(b.fadd(b.fmul(x, v.constant(F32x16, 1.44269504088896341)), magic), magic)
    r = v.muladd(n, v.constant(F32x16, -_LN2_HIGH), x)
    r = v.muladd(n, v.constant(F32x16, -_LN2_LOW), r)
    p = v.constant(F32x16, _EXP[0])
    for coefficient in _EXP[1:]:
        p = v.muladd(p, r, v.constant(F32x16, coefficient))
    p = v.muladd(b.fmul(r, r), p, b.fadd(r, v.constant(F32x16, 1.0)))
    power = b.shl(b.add(b.fptosi(n, I32x16), v.constant(I32x16, 127)), v.constant(I32x16, 23))
    return b.fmul(p, b.bitcast(power, F32x16))


@intrinsic
def rms_norm(context: Any, source: Any, weight: Any, count: Any, epsilon: Any, out: Any) -> Any:
    """out = source / sqrt(mean(source^2) + epsilon) * weight, all float32; `out` may be `source`."""

    def emit(c: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        source, weight, count, epsilon, out = arguments
        v, b = Vectors(builder), builder
        lines, square = b.lshr(count, v.int64(4)), v.variable(F32x16)
        b.store(v.constant(F32x16, 0.0), square)
        with cgutils.for_range(b, lines) as loop:
            x = v.load(v.offset(source, loop.index, LINE), F32x16, 4)
            b.store(v.muladd(x, x, b.load(square)), square)
        mean = b.fdiv(v.sum_lanes(b.load(square)), b.sitofp(count, F32))
        root = v.call("llvm.sqrt.f32", F32, b.fadd(mean, epsilon))
        scale = v.splat(b.fdiv(ir.Constant(F32, 1.0), root))
        with cgutils.for_range(b, lines) as loop:
            x = v.load(v.offset(source, loop.index, LINE), F32x16, 4)
            w = v.load(v.offset(weight, loop.index, LINE), F32x16, 4)
            v.store(b.fmul(b.fmul(x, scale), w), v.offset(out, loop.index, LINE), 4)
        return c.get_dummy_value()

    return VOID(I64, I64, I64, FLOAT, I64), emit


@intrinsic
def silu_product(context: Any, gate: Any, up: Any, count: Any) -> Any:
    """gate = gate * sigmoid(gate) * up, float32."""

    def emit(c: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        gate, up, count = arguments
        v, b = Vectors(builder), builder
        one = v.constant(F32x16, 1.0)
        with cgutils.for_range(b, b.lshr(count, v.int64(4))) as loop:
            place = v.offset(gate, loop.index, LINE)
            g, u = v.load(place, F32x16, 4), v.load(v.offset(up, loop.index, LINE), F32x16, 4)
            sigmoid = b.fdiv(one, b.fadd(one, exponential(v, b.fneg(g))))
            v.store(b.fmul(b.fmul(g, sigmoid), u), place, 4)
        return c.get_dummy_value()

    return VOID(I64, I64, I64), emit


@intrinsic
def rotate(context: Any, vector: Any, cosines: Any, sines: Any, half: Any, scale: Any) -> Any:
    """Rotary embedding of one head in place: elements i and i + half turn by angle i; then times `scale`."""

    def emit(c: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        vector, cosines, sines, half, scale = arguments
        v, b = Vectors(builder), builder
        lanes, factor = 8, v.splat(scale, 8)
        kind = ir.VectorType(F32, lanes)
        with cgutils.for_range(b, b.lshr(half, v.int64(3))) as loop:
            first = v.offset(vector, loop.index, 4 * lanes)
            second = b.add(first, b.mul(half, v.int64(4)))
            x, y = v.load(first, kind, 4), v.load(second, kind, 4)
            cos = v.load(v.offset(cosines, loop.index, 4 * lanes), kind, 4)
            sin = v.load(v.offset(sines, loop.index, 4 * lanes), kind, 4)
            v.store(b.fmul(factor, b.fsub(b.fmul(x, cos), b.fmul(y, sin))), first, 4)
            v.store(b.fmul(factor, b.fadd(b.fmul(y, cos), b.fmul(x, sin))), second, 4)
        return c.get_dummy_value()

    return VOID(I64, I64, I64, I64, FLOAT), emit
