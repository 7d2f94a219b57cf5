"""The records of int64 values that the compiled step runs on. Knows nothing else."""

from __future__ import annotations

from enum import IntEnum, auto


class Step(IntEnum):
    """The record of a step. Strides are in bytes, a `_at` is an address."""

    ROWS = 0  # new positions, of all pieces
    ROWS_AT = auto()  # a Row for each
    DECODES = auto()  # pieces of one row: the first ones of the table
    PIECES_AT = auto()  # a PieceRecord for each
    UNITS = auto()  # of attention, all pieces together
    UNITS_AT_ONCE = auto()  # that a thread claims
    LAYERS = auto()
    LAYERS_AT = auto()
    FIRST_PART = auto()  # two to a layer, then the head; all at once unless ranks add up in between
    LAST_PART = auto()
    ADDED_TO_AT = auto()  # (rows, hidden) float32 that o and down are added to: the residual, or zeros
    ADDED_TO_STRIDE = auto()
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
    PAGE_STRIDE = auto()  # bytes of a page's keys in one layer, and of its values
    HEAD_STRIDE = auto()  # bytes of one head of them
    TOTALS_AT = auto()  # parts of attention for each thread (attention.py)
    TABLES_AT = auto()  # a table of queries for each thread
    NORM_AT = auto()
    HEAD = auto()  # descriptor
    HEAD_ROWS = auto()  # how many rows get logits
    HEAD_ROWS_AT = auto()  # which, int64
    LOGITS_AT = auto()
    LOGITS_STRIDE = auto()
    FINAL_AT = auto()  # (rows, hidden) float32: hidden states after the last norm; 0: nobody wants them
    FINAL_STRIDE = auto()
    TICKETS_AT = auto()  # Ticket.BYTES for each layer and for the head, all 0 (pool.claim)
    FIELDS = auto()


class Row(IntEnum):
    """A new position."""

    POSITION = 0
    PAGES_AT = 1  # its sequence's page table, int64
    FIELDS = 2


class PieceRecord(IntEnum):
    """The new positions of one sequence; those of one row stand before those of several."""

    FIRST_ROW = 0
    ROWS = 1
    POSITION = 2  # of the first
    PAGES_AT = 3
    FIRST_UNIT = 4  # where its units of attention begin
    LAST_UNIT = 5
    FIRST_PAGE = 6  # of one row: the first page that any layer reads
    PARTS_AT = 7  # of one row: room for (heads, pages read) parts
    FIELDS = 8


class Layer(IntEnum):
    """The record of a layer. A linear is the address of its descriptor; FRESH: it must prepare its own
    input."""

    ATTENTION_NORM = 0
    MLP_NORM = 1
    QUERY_NORM = 2  # 0: none
    KEY_NORM = 3
    INPUTS = 4  # linears that make queries, keys and values: at most three, each with the next three fields
    INPUT = 5
    INPUT_OFFSET = 8  # bytes into a row of queries, keys and values
    INPUT_FRESH = 11
    OUTPUT = 14
    GATE = 15
    UP = 16
    UP_FRESH = 17
    DOWN = 18
    KEYS_AT = 19  # of all pages
    VALUES_AT = 20
    WINDOW = 21  # positions that a query sees; 0: all
    FIELDS = 22


class Ticket(IntEnum):
    """Where in its tickets a layer keeps which, in bytes: a cache line for each."""

    INPUTS = 0  # three
    OUTPUT = 192
    GATE = 256
    DOWN = 320
    ATTENTION = 384
    BYTES = 512
