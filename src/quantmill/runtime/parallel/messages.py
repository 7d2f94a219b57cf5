"""Passes as JSON: what the first rank sends to the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quantmill.runtime.interface import Piece


def pieces_to(pieces: Sequence[Piece]) -> list[list[Any]]:
    """Plain lists, in the order of Piece's fields."""
    return [[_ints(p.tokens), int(p.start), _ints(p.pages), bool(p.every)] for p in pieces]


def pieces_from(lists: Sequence[Sequence[Any]]) -> list[Piece]:
    """Inverse of pieces_to."""
    return [Piece(*fields) for fields in lists]


def _ints(values: Sequence[int]) -> list[int]:
    """Whatever kind of integers they are."""
    return [int(v) for v in values]
