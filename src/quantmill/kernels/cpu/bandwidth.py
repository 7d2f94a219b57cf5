"""How fast this machine reads memory: the ceiling that the products are compared with.

Every thread adds up its own contiguous part of an array, 64 bytes at a time, on the pool the products use.
"""

from __future__ import annotations

import time
from functools import cache
from statistics import median
from typing import Any

import numpy as np
from llvmlite import ir

from quantmill.kernels.cpu.jit import I64, VOID, c_function, cgutils, intrinsic
from quantmill.kernels.cpu.layout import aligned
from quantmill.kernels.cpu.memory import field
from quantmill.kernels.cpu.pool import Pool
from quantmill.kernels.cpu.vectors import I32x16, Vectors


@intrinsic
def _add_up(context: Any, begin: Any, lines: Any, out: Any) -> Any:
    """The sum of `lines` times 256 bytes at `begin`, 64 bytes of it stored at `out` so that nothing is left
    out."""

    def emit(c: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        v = Vectors(builder)
        totals = [v.variable(I32x16) for _ in range(4)]
        for total in totals:
            builder.store(v.constant(I32x16, 0), total)
        with cgutils.for_range(builder, arguments[1]) as loop:
            for i, total in enumerate(totals):
                line = v.load(v.offset(arguments[0], loop.index, 256, 64 * i), I32x16, 64)
                builder.store(builder.add(builder.load(total), line), total)
        for total in totals[1:]:
            builder.store(builder.add(builder.load(totals[0]), builder.load(total)), totals[0])
        v.store(builder.load(totals[0]), arguments[2], 4)
        return c.get_dummy_value()

    return VOID(I64, I64, I64), emit


@cache
def _reader() -> Any:
    @c_function(4)
    def read(job: int, thread: int, threads: int, meeting: int) -> None:
        lines = field(job, 1) // (256 * threads)
        _add_up(field(job, 0) + thread * lines * 256, lines, field(job, 2) + 64 * thread)

    return read


def streaming_read(pool: Pool, nbytes: int = 1 << 28, repeats: int = 5) -> float:
    """Median bytes per second of reading `nbytes` of memory once, all threads of `pool` together."""
    data, sums = aligned((nbytes,), np.uint8), np.empty(64 * pool.threads, np.uint8)
    data[:] = 1
    job = np.array([data.ctypes.data, nbytes, sums.ctypes.data], np.int64)
    address, seconds = _reader().address, []
    for _ in range(repeats):
        begin = time.perf_counter()
        pool.run(address, job.ctypes.data)
        seconds.append(time.perf_counter() - begin)
    return nbytes / median(seconds)
