"""One linear on this processor: numpy in, numpy out, on the shared threads.

`RunnableLinear` binds a `CpuLinear` to an instruction set and a precision; `bind`, `lay_row` and `multiply`
are the parts that larger compiled programs (the decode step) call too. Knows no torch and no files.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantmill.errors import BadRequest
from quantmill.kernels.cpu.activations import prepare
from quantmill.kernels.cpu.isa import Isa, choose
from quantmill.kernels.cpu.jit import built_from, c_function, call11, fingerprint, inlined
from quantmill.kernels.cpu.layout import (
    BLOCK,
    DENSE,
    FIELD_BIAS,
    FIELD_BLOCKS,
    FIELD_FUNCTION,
    FIELD_PRECISION,
    FIELD_SLICES,
    SLICE,
    CpuLinear,
    Precision,
    descriptor,
)
from quantmill.kernels.cpu.memory import field
from quantmill.kernels.cpu.pool import Pool, claim, default_threads, meet, share, shared_pool
from quantmill.kernels.cpu.products import product

CHUNK = 256  # rows prepared at once: their int8 form stays in the second-level cache

# The job record.
_LINEAR, _SOURCE, _SOURCE_STRIDE, _ROWS, _OUT, _OUT_STRIDE, _SCRATCH, _TICKET = range(8)


@inlined
def room_for(linear: int, rows: int) -> int:
    """Bytes that `rows` activations of a linear need: values, scales, shifts, to whole lines."""
    size: int = (
        (rows * field(linear, FIELD_SLICES) * (32 * field(linear, FIELD_PRECISION) + 8) + 127) // 64 * 64
    )
    return size


def room(slices: int, rows: int, threads: int) -> int:
    """The largest scratch area that `lay_row` uses for up to `rows` activations."""
    one, many = ((r * slices * (4 * SLICE + 8) + 127) // 64 * 64 for r in (1, rows))
    return max(many, threads * one)


@inlined
def _places(linear: int, rows: int, area: int, thread: int) -> tuple[int, int, int]:
    """Where values, scales and shifts lie in a scratch area; with one activation every thread has its own."""
    if rows == 1:
        area += thread * room_for(linear, 1)
    count = rows * field(linear, FIELD_SLICES)
    scales = area + count * 32 * field(linear, FIELD_PRECISION)
    return area, scales, scales + 4 * count


@inlined
def lay_row(linear: int, source: int, row: int, rows: int, area: int, thread: int) -> None:
    """Prepare one activation (float32 at `source`). A single one is prepared by every thread for itself,
    which
    costs less than meeting; of several each thread prepares some, then all meet before they multiply."""
    x, scales, shifts = _places(linear, rows, area, thread)
    precision = field(linear, FIELD_PRECISION)
    if precision == 1:
        prepare(1, linear, source, row, rows, x, scales, shifts)
    elif precision == 2:
        prepare(2, linear, source, row, rows, x, scales, shifts)
    else:
        prepare(4, linear, source, row, rows, x, scales, shifts)


@inlined
def multiply(
    linear: int, rows: int, area: int, start: int, start_stride: int, out: int, out_stride: int,
    thread: int, threads: int, ticket: int,
) -> None:  # fmt: skip
    """out = start + (prepared activations) @ W.T for the blocks of rows this thread claims; strides in
    bytes."""
    blocks = field(linear, FIELD_BLOCKS)
    part = claim(ticket, blocks, threads)
    while part[0] < part[1]:
        multiply_part(linear, rows, area, start, start_stride, out, out_stride, thread, part)
        part = claim(ticket, blocks, threads)


@inlined
def multiply_part(
    linear: int, rows: int, area: int, start: int, start_stride: int, out: int, out_stride: int,
    thread: int, part: tuple[int, int],
) -> None:  # fmt: skip
    """The same for the blocks [first, last) of `part`."""
    x, scales, shifts = _places(linear, rows, area, thread)
    call11(
        field(linear, FIELD_FUNCTION),
        (linear, x, scales, shifts, rows, part[0], part[1], start, start_stride, out, out_stride),
    )


@cache
def _job() -> Any:
    stamp = fingerprint()

    @c_function(4)
    def run_linear(job: int, thread: int, threads: int, meeting: int) -> None:
        built_from(stamp)
        linear, rows, area = field(job, _LINEAR), field(job, _ROWS), field(job, _SCRATCH)
        first, last = share(rows, thread, threads) if rows > 1 else (0, 1)
        for row in range(first, last):
            source = field(job, _SOURCE) + row * field(job, _SOURCE_STRIDE)
            lay_row(linear, source, row, rows, area, thread)
        if rows > 1:
            meet(meeting, threads)
        bias = field(linear, FIELD_BIAS)
        out, stride, ticket = field(job, _OUT), field(job, _OUT_STRIDE), job + 8 * _TICKET
        multiply(linear, rows, area, bias, 0, out, stride, thread, threads, ticket)

    return run_linear


def bind(linear: CpuLinear, isa: Isa, precision: Precision) -> NDArray[np.int64]:
    """The descriptor of `linear` with its product compiled; dense weights are always EXACT."""
    if linear.bits == DENSE:
        precision = Precision.EXACT
    function = product(isa.name, linear.bits, linear.zeros is not None, precision)
    return descriptor(linear, function.address, precision)


class RunnableLinear:
    """y = x @ W.T + bias with one instruction set, precision and pool.

    isa: a row of isa.py (None: QUANTMILL_CPU_ISA or the fastest); precision: of the activations;
    threads: None for one per core. Raises BadRequest for an instruction set this processor lacks.
    """

    def __init__(
        self,
        linear: CpuLinear,
        *,
        isa: str | None = None,
        precision: Precision = Precision.INT16,
        threads: int | None = None,
    ) -> None:
        self.linear = linear
        self._record = bind(linear, choose(isa), precision)
        self._address = _address(self._record)
        self._function = int(_job().address)
        self._pool: Pool = shared_pool(threads or default_threads())

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """x (rows, in_features) float32 -> (rows, out_features) float32; a view where N % 16 is not 0."""
        if x.ndim != 2 or x.shape[1] != self.linear.in_features or x.dtype != np.float32:
            raise BadRequest(
                f"input is {x.dtype} {x.shape}; this linear takes float32 (rows, {self.linear.in_features})"
            )
        x = np.ascontiguousarray(x)
        out: NDArray[np.float32] = np.empty((len(x), self.linear.blocks * BLOCK), np.float32)
        for begin in range(0, len(x), CHUNK):
            self._chunk(x[begin : begin + CHUNK], out[begin : begin + CHUNK])
        return out[:, : self.linear.out_features]

    def _chunk(self, x: NDArray[np.float32], out: NDArray[np.float32]) -> None:
        rows = len(x)
        scratch = np.empty(room(self.linear.slices, rows, self._pool.threads), np.uint8)
        job = np.array(
            [
                self._address, _address(x), x.strides[0], rows,
                _address(out), out.strides[0], _address(scratch), 0,
            ],
            np.int64,
        )  # fmt: skip
        # A single row is prepared by each thread for itself, so that nobody meets.
        self._pool.run(self._function, _address(job), loose=rows == 1)


def _address(array: NDArray[Any]) -> int:
    """Of the first element; `ctypes.data` takes ten times as long."""
    address: int = array.__array_interface__["data"][0]
    return address
