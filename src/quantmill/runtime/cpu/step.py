"""The compiled step: one or several new positions through all layers to logits, on every thread of a pool.

All threads run the same code on their share of rows, heads or tiles and meet between phases. With one
position every thread prepares the activations for itself, with several they share that out. Everything is
found through two records of int64 values, `Step` and one `Layer` each. Knows no files and no sampling.
"""

from __future__ import annotations

from enum import IntEnum, auto
from functools import cache
from typing import Any

from quantmill.kernels.cpu.jit import built_from, c_function, fingerprint, inlined
from quantmill.kernels.cpu.layout import FIELD_BIAS, FIELD_BLOCKS
from quantmill.kernels.cpu.linear import lay_row, multiply, multiply_part
from quantmill.kernels.cpu.memory import atomic_add, field, floats, integers
from quantmill.kernels.cpu.pool import claim, meet, share
from quantmill.runtime.cpu.attention import (
    BLOCK,
    CHUNK,
    HIGH,
    LOW,
    OUT,
    QUERY,
    ROW,
    attend,
    begin,
    finish,
    join,
    part_size,
    store_position,
)
from quantmill.runtime.cpu.elementwise import rms_norm, rotate, silu_product

TILE = 8  # queries that share a reading of keys and values


class Step(IntEnum):
    """The record of a step. Strides are in bytes, a `_at` is an address."""

    ROWS = 0  # new positions
    POSITION = auto()  # of the first of them
    LAYERS = auto()
    LAYERS_AT = auto()
    HEADS = auto()
    KV_HEADS = auto()
    HIDDEN = auto()
    CONSTANTS_AT = auto()  # float32: epsilon of the norms, scale of the queries
    HIDDEN_AT = auto()  # (rows, hidden) float32: embeddings in, last hidden state out
    HIDDEN_STRIDE = auto()
    QKV_AT = auto()  # (rows, queries, keys, values) float32
    QKV_STRIDE = auto()
    MIXED_AT = auto()  # (rows, heads * head_dim) float32: attention's output
    MIXED_STRIDE = auto()
    GATE_AT = auto()  # (rows, intermediate) float32
    UP_AT = auto()
    GATE_STRIDE = auto()
    COSINES_AT = auto()  # (positions, head_dim / 2) float32
    SINES_AT = auto()
    NORMED_AT = auto()  # a row for each thread
    NORMED_STRIDE = auto()
    AREAS_AT = auto()  # three scratch areas for prepared activations
    AREA_SIZE = auto()
    PARTS_AT = auto()  # parts of attention (attention.py)
    TABLES_AT = auto()  # a table of queries for each thread
    NORM_AT = auto()
    HEAD = auto()  # descriptor
    HEAD_ROWS = auto()  # logits for so many of the last positions
    LOGITS_AT = auto()
    LOGITS_STRIDE = auto()
    TICKETS_AT = auto()  # Ticket.BYTES for each layer and for the head, all 0 (pool.claim)
    FIELDS = auto()


class Layer(IntEnum):
    """The record of a layer. A linear is the address of its descriptor; FRESH: it must prepare its own
    input."""

    ATTENTION_NORM = 0
    MLP_NORM = 1
    QUERY_NORM = 2  # 0: none
    KEY_NORM = 3
    INPUTS = (
        4  # how many linears make queries, keys and values: at most three, each with the next three fields
    )
    INPUT = 5
    INPUT_OFFSET = 8  # bytes into a row of queries, keys and values
    INPUT_FRESH = 11
    OUTPUT = 14
    GATE = 15
    UP = 16
    UP_FRESH = 17
    DOWN = 18
    KEYS_AT = 19
    VALUES_AT = 20
    HEAD_STRIDE = 21  # bytes of one head's keys, and of its values
    CAPACITY = 22  # positions in the ring
    WINDOW = 23  # positions that a query sees; 0: all
    FIELDS = 24


class Ticket(IntEnum):
    """Where in its tickets a layer keeps which, in bytes: a cache line for each."""

    INPUTS = 0  # three
    OUTPUT = 192
    GATE = 256
    DOWN = 320
    ATTENTION = 384
    BYTES = 512


S, L, T = Step, Layer, Ticket
# Plain numbers, for arithmetic in compiled code.
_INPUT, _INPUT_OFFSET, _INPUT_FRESH = int(L.INPUT), int(L.INPUT_OFFSET), int(L.INPUT_FRESH)
_LAYER_BYTES, _TICKET_BYTES = 8 * int(L.FIELDS), int(T.BYTES)
_OUTPUT, _GATE, _DOWN, _ATTENTION = (int(t) for t in (T.OUTPUT, T.GATE, T.DOWN, T.ATTENTION))


@inlined
def _mine(rows: int, thread: int, threads: int) -> tuple[int, int]:
    """Rows that this thread prepares: its share, or the only one."""
    if rows == 1:
        return 0, 1
    return share(rows, thread, threads)


@inlined
def _together(rows: int, meeting: int, threads: int) -> None:
    if rows > 1:
        meet(meeting, threads)


@inlined
def _qkv(step: int, layer: int, tickets: int, thread: int, threads: int, meeting: int) -> None:
    rows = field(step, S.ROWS)
    normed = field(step, S.NORMED_AT) + thread * field(step, S.NORMED_STRIDE)
    areas, size = field(step, S.AREAS_AT), field(step, S.AREA_SIZE)
    epsilon = floats(field(step, S.CONSTANTS_AT), 2)[0]
    count = field(layer, L.INPUTS)
    inputs = integers(layer + 8 * _INPUT, 3)
    offsets, fresh = integers(layer + 8 * _INPUT_OFFSET, 3), integers(layer + 8 * _INPUT_FRESH, 3)
    first, last = _mine(rows, thread, threads)
    for row in range(first, last):
        source = field(step, S.HIDDEN_AT) + row * field(step, S.HIDDEN_STRIDE)
        rms_norm(source, field(layer, L.ATTENTION_NORM), field(step, S.HIDDEN), epsilon, normed)
        for i in range(count):
            if fresh[i]:
                lay_row(inputs[i], normed, row, rows, areas + i * size, thread)
    _together(rows, meeting, threads)
    area = areas
    for i in range(count):
        if fresh[i]:
            area = areas + i * size
        out, bias = field(step, S.QKV_AT) + offsets[i], field(inputs[i], FIELD_BIAS)
        stride = field(step, S.QKV_STRIDE)
        multiply(inputs[i], rows, area, bias, 0, out, stride, thread, threads, tickets + 64 * i)
    meet(meeting, threads)


@inlined
def _rotate(
    step: int, layer: int, head_dim: int, half: bool, thread: int, threads: int, meeting: int
) -> None:
    """Norm and turn queries and keys; put keys and values into the cache."""
    heads, kv_heads = field(step, S.HEADS), field(step, S.KV_HEADS)
    constants = floats(field(step, S.CONSTANTS_AT), 2)
    width = 4 * head_dim
    first, last = share(field(step, S.ROWS) * (heads + kv_heads), thread, threads)
    for unit in range(first, last):
        row, head = unit // (heads + kv_heads), unit % (heads + kv_heads)
        position = field(step, S.POSITION) + row
        vector = field(step, S.QKV_AT) + row * field(step, S.QKV_STRIDE) + head * width
        angles = position * head_dim * 2
        cosines, sines = field(step, S.COSINES_AT) + angles, field(step, S.SINES_AT) + angles
        norm = field(layer, L.QUERY_NORM) if head < heads else field(layer, L.KEY_NORM)
        if norm:
            rms_norm(vector, norm, head_dim, constants[0], vector)
        if head < heads:
            rotate(vector, cosines, sines, head_dim // 2, constants[1])
        else:
            rotate(vector, cosines, sines, head_dim // 2, 1.0)
            offset = (head - heads) * field(layer, L.HEAD_STRIDE)
            keys, values = field(layer, L.KEYS_AT) + offset, field(layer, L.VALUES_AT) + offset
            slot = position % field(layer, L.CAPACITY)
            store_position(head_dim, half, (vector, vector + kv_heads * width), (keys, values), slot)
    meet(meeting, threads)


@inlined
def _low(layer: int, position: int) -> int:
    """First position that a query at `position` sees."""
    window = field(layer, L.WINDOW)
    return max(0, position - window + 1) if window else 0


@inlined
def _cache_of(layer: int, kv_head: int) -> tuple[int, int, int]:
    offset = kv_head * field(layer, L.HEAD_STRIDE)
    blocks = field(layer, L.CAPACITY) // BLOCK
    return field(layer, L.KEYS_AT) + offset, field(layer, L.VALUES_AT) + offset, blocks


@inlined
def _span(chunk: int, high: int) -> tuple[int, int]:
    """First block and number of blocks of a chunk, up to position `high`."""
    first = chunk * (CHUNK // BLOCK)
    return first, min(CHUNK // BLOCK, high // BLOCK - first + 1)


@inlined
def _attend_one(
    step: int, layer: int, head_dim: int, half: bool, tile: int, thread: int, threads: int, meeting: int
) -> None:
    """One new position: tiles of heads times chunks of positions are shared out, then heads to join the
    parts."""
    heads, position = field(step, S.HEADS), field(step, S.POSITION)
    group = heads // field(step, S.KV_HEADS)
    low, parts = _low(layer, position), field(step, S.PARTS_AT)
    begin_chunk, chunks = low // CHUNK, position // CHUNK - low // CHUNK + 1
    size = 4 * part_size(head_dim)
    address = field(step, S.TABLES_AT) + thread * TILE * ROW * 8
    table = integers(address, TILE * ROW)
    first, last = share(heads // tile * chunks, thread, threads)
    for unit in range(first, last):
        head, chunk = unit // chunks * tile, unit % chunks
        for i in range(tile):
            table[i * ROW + QUERY] = field(step, S.QKV_AT) + (head + i) * head_dim * 4
            table[i * ROW + OUT] = parts + ((head + i) * chunks + chunk) * size
            table[i * ROW + LOW] = low
            table[i * ROW + HIGH] = position
        span = _span(begin_chunk + chunk, position)
        attend(head_dim, half, tile, address, _cache_of(layer, head // group), span)
    meet(meeting, threads)
    first, last = share(heads, thread, threads)
    for head in range(first, last):
        total = parts + head * chunks * size
        for chunk in range(1, chunks):
            join(total, total + chunk * size, head_dim)
        finish(total, field(step, S.MIXED_AT) + head * head_dim * 4, head_dim)
    meet(meeting, threads)


@inlined
def _attend_many(
    step: int, layer: int, head_dim: int, half: bool, ticket: int, thread: int, threads: int, meeting: int
) -> None:
    """Several new positions: tiles of queries that share keys, claimed one by one, as later ones see more."""
    rows, position = field(step, S.ROWS), field(step, S.POSITION)
    group = field(step, S.HEADS) // field(step, S.KV_HEADS)
    size = 4 * part_size(head_dim)
    totals = field(step, S.PARTS_AT) + thread * 2 * TILE * size
    address = field(step, S.TABLES_AT) + thread * TILE * ROW * 8
    table = integers(address, TILE * ROW)
    tiles = (rows * group + TILE - 1) // TILE
    units = field(step, S.KV_HEADS) * tiles
    unit = atomic_add(ticket, 1)
    while unit < units:
        kv_head, tile = unit // tiles, unit % tiles
        for i in range(TILE):
            query = min(tile * TILE + i, rows * group - 1)  # the last tile repeats its last query
            row, head = query // group, kv_head * group + query % group
            table[i * ROW + QUERY] = (
                field(step, S.QKV_AT) + row * field(step, S.QKV_STRIDE) + head * head_dim * 4
            )
            table[i * ROW + OUT] = totals + (TILE + i) * size
            table[i * ROW + LOW] = _low(layer, position + row)
            table[i * ROW + HIGH] = position + row
            begin(totals + i * size, head_dim)
        low, high = table[LOW], table[(TILE - 1) * ROW + HIGH]
        cache = _cache_of(layer, kv_head)
        for chunk in range(low // CHUNK, high // CHUNK + 1):
            attend(head_dim, half, 8, address, cache, _span(chunk, high))
            for i in range(TILE):
                join(totals + i * size, totals + (TILE + i) * size, head_dim)
        for i in range(min(TILE, rows * group - tile * TILE)):
            query = tile * TILE + i
            row, head = query // group, kv_head * group + query % group
            out = field(step, S.MIXED_AT) + row * field(step, S.MIXED_STRIDE) + head * head_dim * 4
            finish(totals + i * size, out, head_dim)
        unit = atomic_add(ticket, 1)
    meet(meeting, threads)


@inlined
def _add(
    step: int, linear: int, source: int, stride: int, ticket: int, thread: int, threads: int, meeting: int
) -> None:
    """hidden += linear(source)."""
    rows, area = field(step, S.ROWS), field(step, S.AREAS_AT)
    first, last = _mine(rows, thread, threads)
    for row in range(first, last):
        lay_row(linear, source + row * stride, row, rows, area, thread)
    _together(rows, meeting, threads)
    hidden, hidden_stride = field(step, S.HIDDEN_AT), field(step, S.HIDDEN_STRIDE)
    multiply(linear, rows, area, hidden, hidden_stride, hidden, hidden_stride, thread, threads, ticket)
    meet(meeting, threads)


@inlined
def _gate_up(step: int, layer: int, ticket: int, thread: int, threads: int, meeting: int) -> None:
    rows, hidden = field(step, S.ROWS), field(step, S.HIDDEN)
    gate, up, fresh = field(layer, L.GATE), field(layer, L.UP), field(layer, L.UP_FRESH)
    area = field(step, S.AREAS_AT)
    other = area + field(step, S.AREA_SIZE) if fresh else area
    normed = field(step, S.NORMED_AT) + thread * field(step, S.NORMED_STRIDE)
    epsilon = floats(field(step, S.CONSTANTS_AT), 2)[0]
    first, last = _mine(rows, thread, threads)
    for row in range(first, last):
        source = field(step, S.HIDDEN_AT) + row * field(step, S.HIDDEN_STRIDE)
        rms_norm(source, field(layer, L.MLP_NORM), hidden, epsilon, normed)
        lay_row(gate, normed, row, rows, area, thread)
        if fresh:
            lay_row(up, normed, row, rows, other, thread)
    _together(rows, meeting, threads)
    gates, ups, stride = field(step, S.GATE_AT), field(step, S.UP_AT), field(step, S.GATE_STRIDE)
    gate_bias, up_bias = field(gate, FIELD_BIAS), field(up, FIELD_BIAS)
    blocks = field(gate, FIELD_BLOCKS)
    part = claim(ticket, blocks, threads)
    while part[0] < part[1]:  # the same rows of both, and their product
        multiply_part(gate, rows, area, gate_bias, 0, gates, stride, thread, part)
        multiply_part(up, rows, other, up_bias, 0, ups, stride, thread, part)
        for row in range(rows):
            place = row * stride + part[0] * 64
            silu_product(gates + place, ups + place, (part[1] - part[0]) * 16)
        part = claim(ticket, blocks, threads)
    meet(meeting, threads)


@inlined
def _logits(step: int, ticket: int, thread: int, threads: int, meeting: int) -> None:
    rows, head, area = field(step, S.HEAD_ROWS), field(step, S.HEAD), field(step, S.AREAS_AT)
    normed = field(step, S.NORMED_AT) + thread * field(step, S.NORMED_STRIDE)
    epsilon = floats(field(step, S.CONSTANTS_AT), 2)[0]
    first, last = _mine(rows, thread, threads)
    for row in range(first, last):
        source = field(step, S.HIDDEN_AT)
        source += (field(step, S.ROWS) - rows + row) * field(step, S.HIDDEN_STRIDE)
        rms_norm(source, field(step, S.NORM_AT), field(step, S.HIDDEN), epsilon, normed)
        lay_row(head, normed, row, rows, area, thread)
    _together(rows, meeting, threads)
    logits, stride = field(step, S.LOGITS_AT), field(step, S.LOGITS_STRIDE)
    multiply(head, rows, area, field(head, FIELD_BIAS), 0, logits, stride, thread, threads, ticket)


@cache
def step_function(head_dim: int, half: bool, tile: int) -> Any:
    """The C function of a step (a pool's job). `tile`: heads that decode together, a divisor of heads per
    KV head;
    `half`: whether the cache holds float16."""
    stamp = fingerprint("quantmill.runtime.cpu")

    @c_function(4)
    def run_step(step: int, thread: int, threads: int, meeting: int) -> None:
        built_from(stamp)
        for i in range(field(step, S.LAYERS)):
            layer = field(step, S.LAYERS_AT) + i * _LAYER_BYTES
            tickets = field(step, S.TICKETS_AT) + i * _TICKET_BYTES
            _qkv(step, layer, tickets, thread, threads, meeting)
            _rotate(step, layer, head_dim, half, thread, threads, meeting)
            if field(step, S.ROWS) == 1:
                _attend_one(step, layer, head_dim, half, tile, thread, threads, meeting)
            else:
                _attend_many(step, layer, head_dim, half, tickets + _ATTENTION, thread, threads, meeting)
            mixed, mixed_stride = field(step, S.MIXED_AT), field(step, S.MIXED_STRIDE)
            _add(
                step, field(layer, L.OUTPUT), mixed, mixed_stride, tickets + _OUTPUT, thread, threads, meeting
            )
            _gate_up(step, layer, tickets + _GATE, thread, threads, meeting)
            gates, stride = field(step, S.GATE_AT), field(step, S.GATE_STRIDE)
            _add(step, field(layer, L.DOWN), gates, stride, tickets + _DOWN, thread, threads, meeting)
        ticket = field(step, S.TICKETS_AT) + field(step, S.LAYERS) * _TICKET_BYTES
        _logits(step, ticket, thread, threads, meeting)

    return run_step
