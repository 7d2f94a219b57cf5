"""Who computes how many tokens in the next pass. Knows sequences, pages and clients, no logits.

- Answers under way go first, one token each.
- Prompts get what is left, in chunks: half of it to the oldest, which so is sure to end, the rest to those that end
  soonest.
- Of the waiting, the client that has been given least is next (a virtual counter of tokens for each client).
- Where pages run out, the sequence that came last is put aside and waits at the head of its line. So the oldest
  always ends, and then the next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from quantmill.runtime.engine_sequence import Sequence
from quantmill.runtime.interface import PAGE, RuntimeFacts
from quantmill.runtime.pages import PagePool, pages_for

SCORED_CHUNK = 64  # tokens of a prompt that is scored: each has a row of logits as wide as the vocabulary


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next tokens of a sequence."""

    sequence: Sequence
    count: int


class Scheduler:
    """Lines of waiting sequences by client, and the running ones in the order of their coming."""

    def __init__(
        self, facts: RuntimeFacts, pool: PagePool, max_running: int | None = None, cut: int = 0
    ) -> None:
        """cut: prompts are cut at its multiples only; 0: anywhere."""
        self.facts, self.pool = facts, pool
        self.cut = min(cut, _largest_cut(facts))
        self.max_running = min(facts.max_pieces, facts.max_tokens, max_running or facts.max_pieces)
        self.lines: dict[str, deque[Sequence]] = {}
        self.running: list[Sequence] = []
        self.served: dict[str, float] = {}
        self.preemptions = self.cached_tokens = 0

    @property
    def waiting(self) -> int:
        return sum(map(len, self.lines.values()))

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.running
        for line in self.lines.values():
            yield from line

    def in_line(self) -> Iterator[Sequence]:
        for line in self.lines.values():
            yield from line

    def add(self, sequence: Sequence) -> None:
        client = sequence.request.client
        if client not in self.served:  # a newcomer has no claim on the time before it came
            self.served[client] = min(self.served.values(), default=0.0)
        self.lines.setdefault(client, deque()).append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and its pages back."""
        sequence.finished = True
        sequence.put_aside(self.pool)
        client = sequence.request.client
        if sequence in self.running:
            self.running.remove(sequence)
        elif client in self.lines:
            self.lines[client].remove(sequence)
        if not self.lines.get(client) and all(s.request.client != client for s in self.running):
            self.lines.pop(client, None)
            self.served.pop(client, None)

    def plan(self, prompt_budget: int) -> list[Chunk]:
        """The next pass. `prompt_budget`: tokens for prompts while answers wait for their next token."""
        chunks = self._answers()
        room = self.facts.max_tokens - len(chunks)
        budget = min(room, max(prompt_budget, self.cut)) if chunks else room
        self._admit(budget)
        if len(chunks) < len(self.running):
            planned = {chunk.sequence.order for chunk in chunks}
            chunks += self._share([s for s in self.running if s.order not in planned], budget)
        for chunk in chunks:
            self.served[chunk.sequence.request.client] += chunk.count
        return chunks

    def _answers(self) -> list[Chunk]:
        """One token for every answer under way, oldest first: who is put aside comes after all planned ones.

        The oldest prompt gets its next page in the same order, so that answers cannot starve it.
        """
        chunks: list[Chunk] = []
        prompt_seen = False
        for sequence in list(self.running):
            at_prompt = sequence.left > 1
            if at_prompt and prompt_seen:
                continue
            prompt_seen = prompt_seen or at_prompt
            count = self._whole(sequence) if at_prompt and self.cut else 1
            if sequence.missing(count):  # as of one that was put aside in this loop
                if sequence not in self.running or not self._make_room(sequence, count):
                    continue
                sequence.grow(count, self.pool)
            if not at_prompt:
                chunks.append(Chunk(sequence, 1))
        return chunks

    def _whole(self, sequence: Sequence) -> int:
        """Tokens up to the next place where a text is always cut, so that they get the same bits every time."""
        at, end = sequence.computed, sequence.prompt_tokens
        if at >= end:  # an answer that was put aside is read as it was said
            return min(sequence.left, self.facts.by_row or sequence.left)
        return min(end - at, self.cut - at % self.cut)

    def _make_room(self, sequence: Sequence, count: int) -> bool:
        """Pages for the next `count` tokens. Puts the latest aside until they are there: maybe itself."""
        while sequence.missing(count) > self.pool.available:
            latest = self.running[-1]
            self._put_aside(latest)
            if latest is sequence:
                return False
        return True

    def _put_aside(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self.running.remove(sequence)
        sequence.put_aside(self.pool)
        self.lines.setdefault(sequence.request.client, deque()).appendleft(sequence)

    def _admit(self, budget: int) -> None:
        """Begin waiting sequences while there are places, pages for their whole prompts, and tokens to share."""
        if not any(self.lines.values()):
            return
        lefts = [s.left for s in self.running if s.left > 1]
        pledged = sum(map(pages_for, lefts))
        open_tokens = budget - min(sum(lefts[:1]), budget // 2) - sum(lefts[1:])  # as `_share` will
        while len(self.running) < self.max_running and open_tokens > 0:
            sequence = self._next()
            if sequence is None:
                return
            sequence.take_over(self.pool, max(1, self.cut // PAGE))
            needed = pages_for(sequence.left + 1)
            if self.facts.window is not None:
                needed = min(needed, pages_for(self.facts.window) + 1)
            if self.running and needed + pledged > self.pool.available:
                sequence.put_aside(self.pool)
                return
            self._begin(sequence)
            pledged += needed
            open_tokens -= sequence.left if len(self.running) > 1 else min(sequence.left, budget // 2)

    def _begin(self, sequence: Sequence) -> None:
        self.lines[sequence.request.client].remove(sequence)
        self.cached_tokens += 0 if sequence.begun else sequence.cached
        sequence.begun = True
        place = next((i for i, s in enumerate(self.running) if s.order > sequence.order), len(self.running))
        self.running.insert(place, sequence)

    def _next(self) -> Sequence | None:
        """The first that is ready, of the client that was given least."""
        for client in sorted(self.lines, key=lambda c: self.served[c]):
            for sequence in self.lines[client]:
                if sequence.ready:
                    return sequence
        return None

    def _share(self, prompts: list[Sequence], budget: int) -> list[Chunk]:
        """Chunks of prompts: half of the budget to the oldest, the rest to the shortest first."""
        oldest = prompts[0]
        chunks: list[Chunk] = []
        shares = {oldest.order: max(1, budget // 2)} if len(prompts) > 1 else {}
        for sequence in [oldest, *sorted(prompts[1:], key=lambda s: s.left)]:
            count = min(sequence.left, shares.get(sequence.order, budget), budget)
            if sequence.request.score_prompt is not None:
                count = min(count, SCORED_CHUNK)
            if self.cut:
                whole = self._whole(sequence)
                count = whole if whole <= budget and sequence.missing(whole) <= self.pool.available else 0
            count = sequence.grow(count, self.pool) if count > 0 else 0
            if count > 0:
                chunks.append(Chunk(sequence, count))
                budget -= count
        return chunks


def _largest_cut(facts: RuntimeFacts) -> int:
    """Of which a pass can take two, and the cache one beside a whole window."""
    pages = facts.max_tokens // 2 // PAGE
    if facts.window is not None:
        pages = min(pages, facts.pages - pages_for(facts.window) - 1)
    return max(0, pages) * PAGE
