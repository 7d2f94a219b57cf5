"""One sequence alone on a runtime: tokens in, logits out. Knows no text, no sampling, no other sequences.

The pages of the cache are used in their order and, where a sliding window lets old ones go, round and round.
"""

from __future__ import annotations

from collections.abc import Sequence

from quantmill.errors import BadRequest
from quantmill.runtime.interface import PAGE, Logits, Piece, Runtime


class SingleSequence:
    """The only user of a runtime's cache: `read` a prompt, then token by token."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.ids: list[int] = []  # that have been read
        facts = runtime.facts
        self._read_before = 0  # the most it has ever been, by which pages have been overwritten
        self._pages = [page % facts.pages for page in range(-(-facts.context // PAGE))]
        room = facts.pages * PAGE - (facts.window or 0) - PAGE
        # Tokens of a pass: as many as leave a window whole, even if all but the first are taken back.
        self.at_once = max(1, min(facts.max_tokens, room)) if facts.window else facts.max_tokens

    @property
    def position(self) -> int:
        """How many tokens have been read."""
        return len(self.ids)

    def read(self, ids: Sequence[int]) -> Logits:
        """Read tokens after those read so far -> logits (1, vocab) after the last of them.

        Valid until the next call. Raises BadRequest for an empty list or one that does not fit the context.
        """
        for piece in self._pieces(ids, every=False):
            logits = self.runtime.forward([piece])
            self._advance(piece)
        return logits

    def go_on_to(self, ids: Sequence[int]) -> Logits:
        """Have read exactly `ids` -> logits (1, vocab) after the last; what they share with those read before
        is not read again."""
        same = 0
        for old, new in zip(self.ids, ids[: len(ids) - 1], strict=False):
            if old != new:
                break
            same += 1
        try:
            self.reset(same)
        except BadRequest:  # a window has gone past it
            self.reset()
        return self.read(ids[self.position :])

    def score(self, ids: Sequence[int]) -> Logits:
        """Read tokens -> logits (len(ids), vocab) after each of them; a copy."""
        parts = []
        for piece in self._pieces(ids, every=True):
            logits = self.runtime.forward([piece])
            parts.append(logits.clone() if hasattr(logits, "clone") else logits.copy())
            self._advance(piece)
        return _joined(parts)

    def reset(self, position: int = 0) -> None:
        """Forget all tokens after the first `position`.

        Raises BadRequest for a position that has not been reached or whose window has been overwritten.
        """
        if not 0 <= position <= self.position:
            raise BadRequest(f"cannot go back to token {position} of {self.position}")
        facts = self.runtime.facts
        oldest = max(0, position - (facts.window or 0)) // PAGE
        if position and (self._read_before - 1) // PAGE >= oldest + facts.pages:
            raise BadRequest(f"a sliding window has forgotten token {position}: reset to 0 and read it again")
        del self.ids[position:]
        if position == 0:
            self._read_before = 0

    def _pieces(self, ids: Sequence[int], every: bool) -> list[Piece]:
        facts = self.runtime.facts
        if not len(ids):
            raise BadRequest("there is no token to read: the prompt is empty")
        end = self.position + len(ids)
        if end > facts.context:
            raise BadRequest(f"{end} tokens do not fit the context of {facts.context}: shorten the text")
        return [
            Piece(ids[begin : begin + self.at_once], self.position + begin, self._pages, every)
            for begin in range(0, len(ids), self.at_once)
        ]

    def _advance(self, piece: Piece) -> None:
        self.ids += piece.tokens
        self._read_before = max(self._read_before, self.position)


def _joined(parts: list[Logits]) -> Logits:
    if len(parts) == 1:
        return parts[0]
    if hasattr(parts[0], "device") and not hasattr(parts[0], "__array_interface__"):
        import torch

        return torch.cat(parts)
    import numpy as np

    return np.concatenate(parts)
