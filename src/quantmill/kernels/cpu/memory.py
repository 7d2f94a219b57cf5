"""Raw memory from compiled code: arrays at an address, atomics, waiting. Addresses are int64 values."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from llvmlite import ir

from quantmill.kernels.cpu.jit import I64, VOID, cgutils, compiler, inlined, intrinsic, types

_YIELD = "SwitchToThread" if sys.platform == "win32" else "sched_yield"


@intrinsic
def _pointer(context: Any, address: Any) -> Any:
    def emit(c: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(I64), emit


@inlined
def floats(address: int, count: int) -> Any:
    """The `count` float32 values at `address`, as an array."""
    return compiler.carray(_pointer(address), (count,), np.float32)


@inlined
def integers(address: int, count: int) -> Any:
    """The `count` int64 values at `address`, as an array."""
    return compiler.carray(_pointer(address), (count,), np.int64)


@intrinsic
def field(context: Any, record: Any, index: Any) -> Any:
    """record[index] of an int64 record at an address."""

    def emit(c: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        place = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        number = c.cast(builder, arguments[1], signature.args[1], I64)
        return builder.load(builder.gep(place, [number]))

    return I64(I64, index), emit


@intrinsic
def atomic_load(context: Any, address: Any) -> Any:
    """The int64 at an address, sequentially consistent."""

    def emit(c: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        place = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(place, "seq_cst", 8)

    return I64(I64), emit


@intrinsic
def atomic_store(context: Any, address: Any, value: Any) -> Any:
    """Put an int64 at an address, sequentially consistent."""

    def emit(c: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        place = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        builder.store_atomic(arguments[1], place, "seq_cst", 8)
        return c.get_dummy_value()

    return VOID(I64, I64), emit


@intrinsic
def atomic_add(context: Any, address: Any, value: Any) -> Any:
    """Adds, and returns what was there before."""

    def emit(c: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        place = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, arguments[1], "seq_cst")

    return I64(I64, I64), emit


@intrinsic
def atomic_swap(context: Any, address: Any, old: Any, new: Any) -> Any:
    """Store `new` if `old` is there -> what was there before."""

    def emit(c: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        place = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        found = builder.cmpxchg(place, arguments[1], arguments[2], "seq_cst", "seq_cst")
        return builder.extract_value(found, 0)

    return I64(I64, I64, I64), emit


@intrinsic
def give_way(context: Any) -> Any:
    """Let another thread have this processor."""

    def emit(c: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, _YIELD), [])
        return c.get_dummy_value()

    return VOID(), emit


@intrinsic
def breathe(context: Any) -> Any:
    """The processor's hint that this is a waiting loop, where there is one."""

    def emit(c: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        if builder.module.triple.split("-")[0] in ("x86_64", "i686", "amd64"):
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        return c.get_dummy_value()

    return VOID(), emit
