"""What every backend of the runtime offers: a paged cache and one forward pass over pieces of sequences.

The engine, the generation loop, `bench` and the server see this and nothing below it. No torch at import: on a
processor everything is numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

PAGE = 64  # positions of a cache page, in every backend

Logits = Any  # (rows, vocab) float32: numpy.ndarray on a processor, torch.Tensor on a GPU
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Piece:
    """New tokens of one sequence in a forward pass."""

    tokens: Sequence[int]  # at least one
    start: int  # position of the first of them; positions before it are in the cache
    pages: Sequence[int]  # pages[p // PAGE] holds position p; -1 where a sliding window has let the page go
    every: bool = False  # logits after every token (scoring, speculation), not only after the last


@dataclass(frozen=True, slots=True)
class RuntimeFacts:
    """What a caller has to know of an opened model."""

    name: str  # "cpu int16", "cuda fp16", "reference cpu": for people
    vocab_size: int
    hidden_size: int
    context: int  # positions a sequence may have
    window: int | None  # the sliding window where every layer has one: pages before it may be let go
    pages: int  # in the cache, all free at the start; the caller hands them out
    max_tokens: int  # new tokens in one pass, all pieces together
    max_pieces: int  # sequences in one pass
    bytes_per_token: int  # weights read by one decode step: the share of memory bandwidth comes from it
    bytes_per_page: int  # keys and values, all layers
    eos_token_ids: tuple[int, ...]  # from generation_config.json and config.json
    # Pieces of at most so many tokens have the bits of one token at a time; those of longer ones depend on their
    # length. None: the bits never depend on how a text was cut.
    by_row: int | None = None


class Runtime(Protocol):
    """A model ready to run. Not for use from several threads at once.

    A row's numbers do not depend on what else is in the pass: alone or in any batch, the same bits (a backend
    or mode that trades this for speed says so in `facts.name`).
    """

    @property
    def facts(self) -> RuntimeFacts: ...

    def forward(self, pieces: Sequence[Piece]) -> Logits:
        """One pass: writes keys and values into the pieces' pages -> logits, rows in the order of the pieces.

        One row for a piece, or len(tokens) rows where `every`. The result may be overwritten by the next call.
        Raises BadRequest for tokens outside the vocabulary or positions outside the context.
        """
        ...

    def hidden(self, pieces: Sequence[Piece]) -> Floats:
        """The same pass -> final hidden states (tokens of all pieces, hidden_size) after the last norm."""
        ...

    def close(self) -> None:
        """Give memory, threads and files back."""
        ...
