"""Pieces of sequences -> the tables that the compiled step reads. Knows no weights and no cache.

A row is a new position. Pieces of one row come first in the table of pieces: their attention is shared out by
pages, that of longer ones by queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantmill.errors import BadRequest
from quantmill.kernels.cpu.layout import BLOCK
from quantmill.runtime.cpu.attention import OUTPUT
from quantmill.runtime.cpu.records import PieceRecord as P
from quantmill.runtime.cpu.records import Row as R
from quantmill.runtime.cpu.records import Step
from quantmill.runtime.interface import PAGE, Piece

TILE = 8  # queries that share a reading of keys and values
CLAIMS = 8  # that a thread makes of units of attention where all are of a size

Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a pass may hold, and the heads."""

    tokens: int
    pieces: int
    context: int
    pages: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None  # the widest of all layers; None: some layer sees everything


class Batch:
    """Tables for one pass at a time, in memory that stays where it is but for `parts`, which grows."""

    def __init__(self, limits: Limits, threads: int) -> None:
        self.limits, self.threads = limits, threads
        self.tile = max(n for n in range(1, TILE + 1) if limits.heads // limits.kv_heads % n == 0)
        self.rows: Integers = np.zeros((limits.tokens, R.FIELDS), np.int64)
        self.pieces: Integers = np.zeros((limits.pieces, P.FIELDS), np.int64)
        self.tables: Integers = np.zeros((limits.pieces, -(-limits.context // PAGE)), np.int64)
        self.head_rows: Integers = np.zeros(limits.tokens, np.int64)
        self.parts = np.zeros((0, OUTPUT + limits.head_dim), np.float32)

    def fill(self, pieces: Sequence[Piece], record: Integers) -> Integers:
        """Write the tables and the counts in the step's record; returns the tokens (rows,).

        Raises BadRequest for tokens, positions, pages or sizes that are none.
        """
        sizes = [len(piece.tokens) for piece in pieces]
        self._check(pieces, sizes)
        tokens = np.fromiter((t for piece in pieces for t in piece.tokens), np.int64, sum(sizes))
        if tokens.min() < 0 or tokens.max() >= self.limits.vocab:
            raise BadRequest(f"token ids are to be numbers from 0 to {self.limits.vocab - 1}")
        firsts = np.cumsum([0, *sizes])
        order = sorted(range(len(pieces)), key=lambda i: sizes[i] > 1)
        units = parts = heads = 0
        for place, i in enumerate(order):
            units, parts = self._piece(place, pieces[i], int(firsts[i]), units, parts)
        for piece, first, size in zip(pieces, firsts, sizes, strict=False):
            wanted = size if piece.every else 1
            self.head_rows[heads : heads + wanted] = np.arange(first + size - wanted, first + size)
            heads += wanted
        self._place_parts(order, sizes, parts)
        record[Step.ROWS], record[Step.HEAD_ROWS] = len(tokens), heads
        record[Step.DECODES] = sizes.count(1)
        record[Step.UNITS] = units
        even = sizes.count(1) == len(sizes)
        record[Step.UNITS_AT_ONCE] = -(-units // (CLAIMS * self.threads)) if even else 1
        return tokens

    def _piece(self, place: int, piece: Piece, first: int, unit: int, part: int) -> tuple[int, int]:
        """Write one piece; `unit` and `part` are the next that are free."""
        limits, size = self.limits, len(piece.tokens)
        last_page = (piece.start + size - 1) // PAGE
        low = 0 if limits.window is None else max(0, piece.start - limits.window + 1)
        first_page = low // PAGE
        table = self.tables[place]
        table[first_page : last_page + 1] = piece.pages[first_page : last_page + 1]
        seen = table[first_page : last_page + 1]
        if seen.min() < 0 or seen.max() >= limits.pages:
            raise BadRequest(f"positions {low} to {piece.start + size - 1} lie on pages that are not held")
        self.rows[first : first + size, R.POSITION] = np.arange(piece.start, piece.start + size)
        self.rows[first : first + size, R.PAGES_AT] = table.ctypes.data
        if size == 1:
            units = limits.heads // self.tile * len(seen)
        else:
            units = limits.kv_heads * -(-size * (limits.heads // limits.kv_heads) // TILE)
        address = int(table.ctypes.data)
        self.pieces[place] = (first, size, piece.start, address, unit, unit + units, first_page, part)
        return unit + units, part + (limits.heads * len(seen) if size == 1 else 0)

    def _place_parts(self, order: Sequence[int], sizes: Sequence[int], parts: int) -> None:
        """Make room for the parts and turn their numbers into addresses."""
        if parts > len(self.parts):
            self.parts = np.zeros((2 * parts, self.parts.shape[1]), np.float32)
        self.pieces[: len(order), P.PARTS_AT] *= self.parts.strides[0]
        self.pieces[: len(order), P.PARTS_AT] += self.parts.ctypes.data

    def _check(self, pieces: Sequence[Piece], sizes: Sequence[int]) -> None:
        limits = self.limits
        if not sizes or min(sizes) < 1:
            raise BadRequest("a pass needs at least one piece, a piece at least one token")
        if len(sizes) > limits.pieces or sum(sizes) > limits.tokens:
            raise BadRequest(
                f"{len(sizes)} pieces with {sum(sizes)} tokens; a pass takes {limits.pieces} with {limits.tokens}"
            )
        for piece, size in zip(pieces, sizes, strict=True):
            end = piece.start + size
            if piece.start < 0 or end > limits.context:
                raise BadRequest(f"{end} tokens do not fit the context of {limits.context}: shorten the text")
            if len(piece.pages) * PAGE < end:
                raise BadRequest(f"{end} positions do not fit {len(piece.pages)} pages of {PAGE}")


def padded(columns: int) -> int:
    """Columns filled up to whole blocks."""
    return -(-columns // BLOCK) * BLOCK
