"""The compiled step: new positions of one or several sequences through all layers, on every thread of a pool.

All threads run the same code on their share of rows, heads or tiles and meet between phases. With one
position every thread prepares the activations for itself, with several they share that out. Everything is
found through records of int64 values (records.py). Knows no files and no sampling.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from quantmill.kernels.cpu.jit import built_from, c_function, fingerprint, inlined
from quantmill.kernels.cpu.layout import FIELD_BIAS, FIELD_BLOCKS
from quantmill.kernels.cpu.linear import lay_row, multiply, multiply_part
from quantmill.kernels.cpu.memory import atomic_add, field, floats, integers
from quantmill.kernels.cpu.pool import claim, meet, share
from quantmill.runtime.cpu.attention import (
    BLOCK,
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
from quantmill.runtime.cpu.batch import TILE
from quantmill.runtime.cpu.elementwise import rms_norm, rotate, silu_product
from quantmill.runtime.cpu.records import Layer, PieceRecord, Row, Step, Ticket
from quantmill.runtime.interface import PAGE

S, L, R, P, T = Step, Layer, Row, PieceRecord, Ticket
# Plain numbers, for arithmetic in compiled code.
_INPUT, _INPUT_OFFSET, _INPUT_FRESH = int(L.INPUT), int(L.INPUT_OFFSET), int(L.INPUT_FRESH)
_LAYER_BYTES, _TICKET_BYTES = 8 * int(L.FIELDS), int(T.BYTES)
_ROW_BYTES, _PIECE_BYTES = 8 * int(R.FIELDS), 8 * int(P.FIELDS)
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
        record = field(step, S.ROWS_AT) + row * _ROW_BYTES
        position = field(record, R.POSITION)
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
            page = field(field(record, R.PAGES_AT), position // PAGE)
            cache = _cache_of(step, layer, page, head - heads)
            store_position(head_dim, half, (vector, vector + kv_heads * width), cache, position % PAGE)
    meet(meeting, threads)


@inlined
def _low(layer: int, position: int) -> int:
    """First position that a query at `position` sees."""
    window = field(layer, L.WINDOW)
    return max(0, position - window + 1) if window else 0


@inlined
def _cache_of(step: int, layer: int, page: int, kv_head: int) -> tuple[int, int]:
    offset = page * field(step, S.PAGE_STRIDE) + kv_head * field(step, S.HEAD_STRIDE)
    return field(layer, L.KEYS_AT) + offset, field(layer, L.VALUES_AT) + offset


@inlined
def _span(page: int, high: int) -> tuple[int, int]:
    """First position of a sequence's page, and how many blocks of it reach up to position `high`."""
    return page * PAGE, min(PAGE // BLOCK, high // BLOCK - page * (PAGE // BLOCK) + 1)


@inlined
def _attend_one(
    step: int, layer: int, piece: int, unit: int, head_dim: int, half: bool, tile: int, thread: int
) -> None:
    """One unit of a piece of one row: a tile of heads on one page."""
    heads, position = field(step, S.HEADS), field(piece, P.POSITION)
    group, begin_page = heads // field(step, S.KV_HEADS), field(piece, P.FIRST_PAGE)
    pages = position // PAGE - begin_page + 1
    low, size = _low(layer, position), 4 * part_size(head_dim)
    head, place = unit // pages * tile, unit % pages
    page = begin_page + place
    if page < low // PAGE:
        return
    query = field(step, S.QKV_AT) + field(piece, P.FIRST_ROW) * field(step, S.QKV_STRIDE)
    address = field(step, S.TABLES_AT) + thread * TILE * ROW * 8
    table = integers(address, TILE * ROW)
    for i in range(tile):
        table[i * ROW + QUERY] = query + (head + i) * head_dim * 4
        table[i * ROW + OUT] = field(piece, P.PARTS_AT) + ((head + i) * pages + place) * size
        table[i * ROW + LOW] = low
        table[i * ROW + HIGH] = position
    cache = _cache_of(step, layer, field(field(piece, P.PAGES_AT), page), head // group)
    attend(head_dim, half, tile, address, cache, _span(page, position))


@inlined
def _join_one(step: int, layer: int, head_dim: int, thread: int, threads: int) -> None:
    """The parts of every piece of one row as its output."""
    heads, size = field(step, S.HEADS), 4 * part_size(head_dim)
    first, last = share(field(step, S.DECODES) * heads, thread, threads)
    for unit in range(first, last):
        piece, head = field(step, S.PIECES_AT) + unit // heads * _PIECE_BYTES, unit % heads
        position, begin_page = field(piece, P.POSITION), field(piece, P.FIRST_PAGE)
        pages = position // PAGE - begin_page + 1
        parts = field(piece, P.PARTS_AT) + head * pages * size
        first_page = _low(layer, position) // PAGE - begin_page
        total = parts + first_page * size
        for page in range(first_page + 1, pages):
            join(total, parts + page * size, head_dim)
        out = field(step, S.MIXED_AT) + field(piece, P.FIRST_ROW) * field(step, S.MIXED_STRIDE)
        finish(total, out + head * head_dim * 4, head_dim)


@inlined
def _attend_many(
    step: int, layer: int, piece: int, unit: int, head_dim: int, half: bool, thread: int
) -> None:
    """One unit of a piece of several rows: a tile of queries that share keys, on all their pages."""
    rows, position, first_row = field(piece, P.ROWS), field(piece, P.POSITION), field(piece, P.FIRST_ROW)
    group = field(step, S.HEADS) // field(step, S.KV_HEADS)
    size = 4 * part_size(head_dim)
    totals = field(step, S.TOTALS_AT) + thread * 2 * TILE * size
    address = field(step, S.TABLES_AT) + thread * TILE * ROW * 8
    table = integers(address, TILE * ROW)
    tiles = (rows * group + TILE - 1) // TILE
    kv_head, tile = unit // tiles, unit % tiles
    for i in range(TILE):
        query = min(tile * TILE + i, rows * group - 1)  # the last tile repeats its last query
        row, head = query // group, kv_head * group + query % group
        vector = field(step, S.QKV_AT) + (first_row + row) * field(step, S.QKV_STRIDE)
        table[i * ROW + QUERY] = vector + head * head_dim * 4
        table[i * ROW + OUT] = totals + (TILE + i) * size
        table[i * ROW + LOW] = _low(layer, position + row)
        table[i * ROW + HIGH] = position + row
        begin(totals + i * size, head_dim)
    low, high = table[LOW], table[(TILE - 1) * ROW + HIGH]
    pages_at = field(piece, P.PAGES_AT)
    for page in range(low // PAGE, high // PAGE + 1):
        cache = _cache_of(step, layer, field(pages_at, page), kv_head)
        attend(head_dim, half, 8, address, cache, _span(page, high))
        for i in range(TILE):
            join(totals + i * size, totals + (TILE + i) * size, head_dim)
    for i in range(min(TILE, rows * group - tile * TILE)):
        query = tile * TILE + i
        row, head = query // group, kv_head * group + query % group
        out = field(step, S.MIXED_AT) + (first_row + row) * field(step, S.MIXED_STRIDE)
        finish(totals + i * size, out + head * head_dim * 4, head_dim)


@inlined
def _attend(
    step: int, layer: int, head_dim: int, half: bool, tile: int, ticket: int,
    thread: int, threads: int, meeting: int,
) -> None:  # fmt: skip
    """Units of all pieces, claimed in order; then the parts of pieces of one row are joined."""
    units, at_once = field(step, S.UNITS), field(step, S.UNITS_AT_ONCE)
    piece = field(step, S.PIECES_AT)
    first = atomic_add(ticket, at_once)
    while first < units:
        for unit in range(first, min(first + at_once, units)):
            while unit >= field(piece, P.LAST_UNIT):
                piece += _PIECE_BYTES
            place = unit - field(piece, P.FIRST_UNIT)
            if field(piece, P.ROWS) == 1:
                _attend_one(step, layer, piece, place, head_dim, half, tile, thread)
            else:
                _attend_many(step, layer, piece, place, head_dim, half, thread)
        first = atomic_add(ticket, at_once)
    meet(meeting, threads)
    if field(step, S.DECODES):
        _join_one(step, layer, head_dim, thread, threads)
        meet(meeting, threads)


@inlined
def _add(
    step: int, linear: int, source: int, stride: int, ticket: int, thread: int, threads: int, meeting: int
) -> None:
    """hidden = what it is added to, as a rule hidden itself, + linear(source)."""
    rows, area = field(step, S.ROWS), field(step, S.AREAS_AT)
    first, last = _mine(rows, thread, threads)
    for row in range(first, last):
        lay_row(linear, source + row * stride, row, rows, area, thread)
    _together(rows, meeting, threads)
    hidden, hidden_stride = field(step, S.HIDDEN_AT), field(step, S.HIDDEN_STRIDE)
    begin, begin_stride = field(step, S.ADDED_TO_AT), field(step, S.ADDED_TO_STRIDE)
    multiply(linear, rows, area, begin, begin_stride, hidden, hidden_stride, thread, threads, ticket)
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
def _finish(step: int, ticket: int, thread: int, threads: int, meeting: int) -> None:
    """Logits of the rows that get some, or the last norm's output of all."""
    rows, head, area = field(step, S.HEAD_ROWS), field(step, S.HEAD), field(step, S.AREAS_AT)
    normed = field(step, S.NORMED_AT) + thread * field(step, S.NORMED_STRIDE)
    epsilon = floats(field(step, S.CONSTANTS_AT), 2)[0]
    hidden, stride = field(step, S.HIDDEN_AT), field(step, S.HIDDEN_STRIDE)
    size, weight = field(step, S.HIDDEN), field(step, S.NORM_AT)
    if field(step, S.FINAL_AT):
        first, last = share(field(step, S.ROWS), thread, threads)
        for row in range(first, last):
            out = field(step, S.FINAL_AT) + row * field(step, S.FINAL_STRIDE)
            rms_norm(hidden + row * stride, weight, size, epsilon, out)
    if rows == 0:
        return
    first, last = _mine(rows, thread, threads)
    for row in range(first, last):
        source = hidden + field(field(step, S.HEAD_ROWS_AT), row) * stride
        rms_norm(source, weight, size, epsilon, normed)
        lay_row(head, normed, row, rows, area, thread)
    _together(rows, meeting, threads)
    logits, stride = field(step, S.LOGITS_AT), field(step, S.LOGITS_STRIDE)
    multiply(head, rows, area, field(head, FIELD_BIAS), 0, logits, stride, thread, threads, ticket)


@inlined
def _attention(
    step: int, layer: int, tickets: int, head_dim: int, half: bool, tile: int,
    thread: int, threads: int, meeting: int,
) -> None:  # fmt: skip
    """The first part of a layer."""
    _qkv(step, layer, tickets, thread, threads, meeting)
    _rotate(step, layer, head_dim, half, thread, threads, meeting)
    _attend(step, layer, head_dim, half, tile, tickets + _ATTENTION, thread, threads, meeting)
    mixed, stride = field(step, S.MIXED_AT), field(step, S.MIXED_STRIDE)
    _add(step, field(layer, L.OUTPUT), mixed, stride, tickets + _OUTPUT, thread, threads, meeting)


@inlined
def _mlp(step: int, layer: int, tickets: int, thread: int, threads: int, meeting: int) -> None:
    """The second part of a layer."""
    _gate_up(step, layer, tickets + _GATE, thread, threads, meeting)
    gates, stride = field(step, S.GATE_AT), field(step, S.GATE_STRIDE)
    _add(step, field(layer, L.DOWN), gates, stride, tickets + _DOWN, thread, threads, meeting)


@cache
def step_function(head_dim: int, half: bool, tile: int) -> Any:
    """The C function of a step (a pool's job).

    tile: heads that decode together, a divisor of heads per KV head; half: whether the cache holds float16.
    """
    stamp = fingerprint("quantmill.runtime.cpu")

    @c_function(4)
    def run_step(step: int, thread: int, threads: int, meeting: int) -> None:
        built_from(stamp)
        layers = field(step, S.LAYERS)
        for part in range(field(step, S.FIRST_PART), field(step, S.LAST_PART)):
            layer = field(step, S.LAYERS_AT) + part // 2 * _LAYER_BYTES
            tickets = field(step, S.TICKETS_AT) + part // 2 * _TICKET_BYTES
            if part == 2 * layers:
                _finish(step, tickets, thread, threads, meeting)
            elif part % 2 == 0:
                _attention(step, layer, tickets, head_dim, half, tile, thread, threads, meeting)
            else:
                _mlp(step, layer, tickets, thread, threads, meeting)

    return run_step
