"""Attention over a paged cache, one page of 64 positions at a time, for up to eight queries that share keys.

In a page a head's keys lie as (4 blocks, head_dim, 16 positions), its values as (64 positions, head_dim),
float32 or float16. A query's part from one page is (maximum, sum, output): parts are joined by `join`, always
in the order of positions, and no sum depends on how many queries are read together, so that neither threads
nor batches change a bit. The method of parts is online softmax (Milakov and Gimelshein, 2018; Dao et al.,
2022).
"""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir

from quantmill.kernels.cpu.jit import I64, VOID, cgutils, inlined, intrinsic
from quantmill.kernels.cpu.memory import floats
from quantmill.kernels.cpu.vectors import F32, I16, I32, F32x16, I16x16, I32x16, Value, Vectors
from quantmill.kernels.cpu.vectors import I64 as INT64
from quantmill.runtime.cpu.elementwise import exponential
from quantmill.runtime.interface import PAGE

BLOCK = 16  # positions
CHAINS = 2  # independent sums of a score: one would wait for its own last addition
NEVER = -1e30  # the score of a position that a query may not see

# One query's row in the table that `attend` reads: int64 each.
QUERY, OUT, LOW, HIGH = range(4)  # addresses of the vector and of the part; first and last position it sees
ROW = 4
MAXIMUM, SUM, OUTPUT = 0, 1, 16  # where a part keeps what, in floats


@inlined
def part_size(head_dim: int) -> int:
    """Floats of a part."""
    return OUTPUT + head_dim


@intrinsic
def attend(context: Any, head_dim: Any, half: Any, queries: Any, table: Any, cache: Any, span: Any) -> Any:
    """Write the parts of `queries` (a literal, 1 to 8) rows of `table` for one page.

    cache: addresses of the head's keys and values there; span: the page's first position, blocks of 16 to read.
    """
    literals = head_dim, half, queries

    def emit(c: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        where = [*cgutils.unpack_tuple(builder, arguments[4]), *cgutils.unpack_tuple(builder, arguments[5])]
        sizes = (a.literal_value for a in literals)
        _Page(Vectors(builder), *sizes, arguments[3], *where).emit()
        return c.get_dummy_value()

    return VOID(*literals, table, cache, span), emit


class _Page:
    """Emits scores, softmax and the sum of values for one page."""

    def __init__(
        self, v: Vectors, head_dim: int, half: bool, queries: int, table: Value, *where: Value
    ) -> None:
        self.v, self.head_dim, self.half, self.queries = v, head_dim, half, queries
        self.keys, self.values, self.first, self.blocks = where
        self.size = 2 if half else 4
        self.table = [
            [v.load(v.builder.add(table, v.int64(8 * (ROW * q + i))), INT64, 8) for i in range(ROW)]
            for q in range(queries)
        ]
        scores = cgutils.alloca_once(v.builder, ir.ArrayType(F32, queries * PAGE))
        self.scores = v.builder.ptrtoint(scores, INT64)

    def emit(self) -> None:
        with cgutils.for_range(self.v.builder, self.blocks) as loop:
            self._scores(loop.index)
        for q in range(self.queries):
            self._softmax(q)
        at_once = max(1, min(self.head_dim // 16, 16 // self.queries))
        for begin in range(0, self.head_dim // 16, at_once):
            self._output(range(begin, min(begin + at_once, self.head_dim // 16)))

    def _load(self, address: Value) -> Value:
        if not self.half:
            return self.v.load(address, F32x16, 4)
        return self.v.half_to_float(self.v.load(address, I16x16, 2), native=True)

    def _score(self, q: int, block: Value) -> Value:
        """Address of a query's 16 scores."""
        return self.v.offset(self.scores, block, 64, 4 * PAGE * q)

    def _scores(self, block: Value) -> None:
        v, b = self.v, self.v.builder
        keys = v.offset(self.keys, block, 16 * self.head_dim * self.size)
        sums = [[v.variable(F32x16) for _ in range(CHAINS)] for _ in range(self.queries)]
        for chain in sums:
            for total in chain:
                b.store(v.constant(F32x16, 0.0), total)
        with cgutils.for_range(b, v.int64(self.head_dim // CHAINS)) as loop:
            for i in range(CHAINS):
                key = self._load(v.offset(keys, loop.index, 16 * self.size * CHAINS, 16 * self.size * i))
                for q, chain in enumerate(sums):
                    x = v.load_splat(v.offset(self.table[q][QUERY], loop.index, 4 * CHAINS, 4 * i), F32)
                    b.store(v.muladd(key, x, b.load(chain[i])), chain[i])
        lanes = ir.Constant(I32x16, list(range(16)))
        start = b.trunc(v.offset(self.first, block, BLOCK), I32)
        positions = b.add(v.splat(start), lanes)
        for q, chain in enumerate(sums):
            total = b.load(chain[0])
            for other in chain[1:]:
                total = b.fadd(total, b.load(other))
            low, high = (v.splat(b.trunc(self.table[q][end], I32)) for end in (LOW, HIGH))
            seen = b.and_(b.icmp_signed(">=", positions, low), b.icmp_signed("<=", positions, high))
            v.store(b.select(seen, total, v.constant(F32x16, NEVER)), self._score(q, block), 4)

    def _softmax(self, q: int) -> None:
        v, b = self.v, self.v.builder
        largest, total = v.variable(F32x16), v.variable(F32x16)
        b.store(v.constant(F32x16, NEVER), largest)
        b.store(v.constant(F32x16, 0.0), total)
        with cgutils.for_range(b, self.blocks) as loop:
            score = v.load(self._score(q, loop.index), F32x16, 4)
            b.store(v.maximum(score, b.load(largest)), largest)
        maximum = v.max_lanes(b.load(largest))
        with cgutils.for_range(b, self.blocks) as loop:
            score = v.load(self._score(q, loop.index), F32x16, 4)
            weight = exponential(v, b.fsub(score, v.splat(maximum)))
            seen = b.fcmp_ordered(">", score, v.constant(F32x16, NEVER))
            weight = b.select(seen, weight, v.constant(F32x16, 0.0))
            v.store(weight, self._score(q, loop.index), 4)
            b.store(b.fadd(weight, b.load(total)), total)
        part = self.table[q][OUT]
        v.store(maximum, b.add(part, v.int64(4 * MAXIMUM)), 4)
        v.store(v.sum_lanes(b.load(total)), b.add(part, v.int64(4 * SUM)), 4)

    def _output(self, lines: range) -> None:
        """The weighted sum of values, for some lines of 16 of the head's elements."""
        v, b = self.v, self.v.builder
        sums = [[v.variable(F32x16) for _ in lines] for _ in range(self.queries)]
        for row in sums:
            for total in row:
                b.store(v.constant(F32x16, 0.0), total)
        with cgutils.for_range(b, self.blocks) as outer:
            rows = v.offset(self.values, outer.index, BLOCK * self.head_dim * self.size)
            with cgutils.for_range(b, v.int64(BLOCK)) as inner:
                row = v.offset(rows, inner.index, self.head_dim * self.size)
                loaded = [self._load(b.add(row, v.int64(16 * self.size * i))) for i in lines]
                for q in range(self.queries):
                    weight = v.load_splat(v.offset(self._score(q, outer.index), inner.index, 4), F32)
                    for total, value in zip(sums[q], loaded, strict=True):
                        b.store(v.muladd(weight, value, b.load(total)), total)
        for q in range(self.queries):
            for total, i in zip(sums[q], lines, strict=True):
                v.store(b.load(total), b.add(self.table[q][OUT], v.int64(4 * (OUTPUT + 16 * i))), 4)


@inlined
def join(total: int, part: int, head_dim: int) -> None:
    """total = the two parts as one."""
    a, b = floats(total, OUTPUT + head_dim), floats(part, OUTPUT + head_dim)
    largest = max(a[MAXIMUM], b[MAXIMUM])
    keep, add = math.exp(a[MAXIMUM] - largest), math.exp(b[MAXIMUM] - largest)
    a[MAXIMUM] = largest
    a[SUM] = a[SUM] * keep + b[SUM] * add
    for i in range(OUTPUT, OUTPUT + head_dim):
        a[i] = a[i] * keep + b[i] * add


@inlined
def begin(total: int, head_dim: int) -> None:
    """A part that has seen nothing."""
    a = floats(total, OUTPUT + head_dim)
    a[MAXIMUM] = NEVER
    a[SUM] = 0.0
    for i in range(OUTPUT, OUTPUT + head_dim):
        a[i] = 0.0


@inlined
def finish(total: int, out: int, head_dim: int) -> None:
    """out (head_dim,) = the attention's output."""
    a, o = floats(total, OUTPUT + head_dim), floats(out, head_dim)
    scale = 1.0 / a[SUM]
    for i in range(head_dim):
        o[i] = a[OUTPUT + i] * scale


@intrinsic
def store_position(context: Any, head_dim: Any, half: Any, new: Any, cache: Any, slot: Any) -> Any:
    """Put a position's key and value (addresses of float32) into place `slot` of a head's page (addresses of
    both)."""
    literals = head_dim, half

    def emit(c: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        key, value = cgutils.unpack_tuple(builder, arguments[2])
        keys, values = cgutils.unpack_tuple(builder, arguments[3])
        slot = arguments[4]
        v, b = Vectors(builder), builder
        size, dim = (2 if half.literal_value else 4), head_dim.literal_value

        def put(source: Value, target: Value) -> None:
            number = v.load(source, F32, 4)
            if half.literal_value:
                number = b.bitcast(b.fptrunc(number, ir.HalfType()), I16)
            v.store(number, target, size)

        block, lane = b.lshr(slot, v.int64(4)), b.and_(slot, v.int64(15))
        column = b.add(v.offset(keys, block, 16 * dim * size), b.mul(lane, v.int64(size)))
        row = v.offset(values, slot, dim * size)
        with cgutils.for_range(b, v.int64(dim)) as loop:
            put(v.offset(key, loop.index, 4), v.offset(column, loop.index, 16 * size))
            put(v.offset(value, loop.index, 4), v.offset(row, loop.index, size))
        return c.get_dummy_value()

    return VOID(*literals, new, cache, I64), emit
