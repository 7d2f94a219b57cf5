"""numba's decorators with types, and the stamp that ties compiled code to the sources it came from.

numba's disk cache only watches the file a function stands in. Ours are emitted by several files, so every
cached function carries `fingerprint()`, a hash of all of them, as a literal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from typing import Any, TypeVar

import numba
import numba.core
import numba.extending
from llvmlite import ir

Function = TypeVar("Function", bound=Callable[..., Any])

# Their annotations do not describe what compiled code and the code that emits it do.
cgutils: Any = numba.core.cgutils
compiler: Any = numba
types: Any = numba.core.types
I64 = types.int64
F32 = types.float32
VOID = types.void


@cache
def fingerprint(*packages: str) -> str:
    """Hash of every source file of this package, and of others, whose code ends up in compiled kernels."""
    digest = hashlib.sha256(numba.__version__.encode())
    for package in (__package__, *packages):
        sources = [f for f in files(package).iterdir() if f.name.endswith(".py")]
        for source in sorted(sources, key=lambda f: f.name):
            digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def intrinsic(function: Callable[..., Any]) -> Callable[..., Any]:
    """numba.extending.intrinsic whose integer and string literals reach the typing function as literals."""
    made: Callable[..., Any] = numba.extending.intrinsic(prefer_literal=True)(function)
    return made


def inlined(function: Function) -> Function:
    """A helper that only compiled code calls; it is compiled into its callers and never cached alone."""
    made: Function = compiler.njit(nogil=True, error_model="numpy", no_cpython_wrapper=True)(function)
    return made


def entry(function: Function) -> Function:
    """A function that Python calls: releases the interpreter lock, cached on disk."""
    made: Function = compiler.njit(nogil=True, error_model="numpy", cache=True)(function)
    return made


def c_function(arguments: int) -> Callable[[Callable[..., None]], Any]:
    """A cached C function of `arguments` int64 values that returns nothing; `.address` is its entry point."""
    signature = VOID(*[I64] * arguments)

    def decorate(function: Callable[..., None]) -> Any:
        return compiler.cfunc(signature, cache=True, error_model="numpy")(function)

    return decorate


@intrinsic
def built_from(context: Any, stamp: Any) -> Any:
    """Emits nothing; makes the literal `stamp` part of the caller's cache key."""

    def emit(c: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        return c.get_dummy_value()

    return VOID(stamp), emit


def _caller(arguments: int) -> Any:
    @intrinsic
    def call(context: Any, address: Any, values: Any) -> Any:
        def emit(c: Any, builder: ir.IRBuilder, signature: Any, given: Any) -> Any:
            kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * arguments)
            target = builder.inttoptr(given[0], kind.as_pointer())
            builder.call(target, [builder.extract_value(given[1], i) for i in range(arguments)])
            return c.get_dummy_value()

        return VOID(I64, types.UniTuple(I64, arguments)), emit

    return call


call4 = _caller(4)  # call4(address, (a, b, c, d)): a C function of four int64 values
call11 = _caller(11)
