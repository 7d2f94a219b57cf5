"""A model small enough to be checked by hand, behind the real interface.

Each position stores a vector made of its token and its place; logits are a fixed function of the sum of all vectors
that a position may see. So a page too many, too few, stale or in the wrong place changes the answer, and `told`
says without any cache what the answer has to be.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from quantmill.runtime.interface import PAGE, Piece, RuntimeFacts
from quantmill.runtime.sampling import SamplerState, sample
from quantmill.types import SamplingParams

VOCAB, WIDTH, END = 61, 16, 60


class ToyRuntime:
    """Refuses, with an assertion, every pass that a real runtime could not serve."""

    def __init__(
        self,
        pages: int = 64,
        *,
        context: int = 4096,
        window: int | None = None,
        max_tokens: int = 256,
        max_pieces: int = 16,
        vocab: int = VOCAB,
        ends: tuple[int, ...] = (END,),
        by_row: int | None = None,
    ) -> None:
        """by_row: as a GPU's: what a longer piece stores depends a little on where it begins and ends."""
        self.facts = RuntimeFacts(
            "toy", vocab, WIDTH, context, window, pages, max_tokens, max_pieces, 1000, 100, ends, by_row
        )
        rng = np.random.default_rng(11)
        self.table = rng.normal(0, 1, (vocab, WIDTH))
        self.head = rng.normal(0, 1.2, (vocab, WIDTH))
        self.cache = np.full((pages, PAGE, WIDTH), np.nan)
        self.passes: list[list[int]] = []  # tokens of every piece of every pass
        self.fail = False

    def forward(self, pieces: Sequence[Piece]) -> np.ndarray:
        if self.fail:
            raise RuntimeError("the toy broke")
        sums = self._run(pieces)
        rows = [s if p.every else s[-1:] for s, p in zip(sums, pieces, strict=True)]
        return np.concatenate([self.logits(r) for r in rows])

    def hidden(self, pieces: Sequence[Piece]) -> np.ndarray:
        return np.concatenate(self._run(pieces)).astype(np.float32)

    def close(self) -> None:
        self.cache = np.zeros(0)

    def logits(self, sums: np.ndarray) -> np.ndarray:
        """One product per row: the same bits in any batch."""
        return np.stack([(self.head * np.sin(s)).sum(axis=1) for s in sums]).astype(np.float32)

    def vector(self, token: int, position: int) -> np.ndarray:
        return self.table[token] * (1 + position % 7) + position * 1e-3

    def taint(self, piece: Piece) -> float:
        """What a piece adds to all that it stores; much more than a GPU does."""
        most, size = self.facts.by_row, len(piece.tokens)
        return (
            0.0 if most is None or size <= most else 1e-2 * ((size * 7 + piece.start * 13 + piece.every) % 11)
        )

    def _run(self, pieces: Sequence[Piece]) -> list[np.ndarray]:
        self._examine(pieces)
        return [np.stack([self._one(p, i) for i in range(len(p.tokens))]) for p in pieces]

    def _one(self, piece: Piece, i: int) -> np.ndarray:
        position = piece.start + i
        self.cache[piece.pages[position // PAGE], position % PAGE] = self.vector(
            piece.tokens[i], position
        ) + self.taint(piece)
        first = 0 if self.facts.window is None else max(0, position - self.facts.window + 1)
        seen = [(piece.pages[p // PAGE], p % PAGE) for p in range(first, position + 1)]
        assert all(page >= 0 for page, _ in seen), "a page that is still seen was let go"
        pages, places = zip(*seen, strict=True)
        total = self.cache[list(pages), list(places)].sum(axis=0)
        assert np.isfinite(total).all(), "a position was read that was never written"
        return np.asarray(total)

    def _examine(self, pieces: Sequence[Piece]) -> None:
        facts = self.facts
        assert 0 < len(pieces) <= facts.max_pieces
        assert sum(len(p.tokens) for p in pieces) <= facts.max_tokens
        written: list[int] = []
        for p in pieces:
            assert p.tokens
            assert p.start + len(p.tokens) <= min(facts.context, len(p.pages) * PAGE)
            written += {p.pages[q // PAGE] for q in range(p.start, p.start + len(p.tokens))}
        assert min(written) >= 0
        assert len(written) == len(set(written)), "two sequences write into one page"
        self.passes.append([len(p.tokens) for p in pieces])


def told(runtime: ToyRuntime, prompt: Sequence[int], params: SamplingParams, choice: int = 0) -> list[int]:
    """The answer to a prompt, by definition: no pages, no batch, everything anew for every token. Without the
    end token."""
    tokens, state = list(prompt), SamplerState(params, prompt, choice)
    limit = min(len(prompt) + params.max_new_tokens, runtime.facts.context)
    while len(tokens) < limit:
        first = 0 if runtime.facts.window is None else max(0, len(tokens) - runtime.facts.window)
        total = np.stack([runtime.vector(tokens[p], p) for p in range(first, len(tokens))]).sum(axis=0)
        token = sample(runtime.logits(total[None])[0], state).token
        if token in runtime.facts.eos_token_ids and not params.ignore_eos:
            break
        tokens.append(token)
    return tokens[len(prompt) :]
