"""Continuous batching: token ids in, events out. Knows no text and no HTTP.

    plan -> one forward pass -> sample -> events

Every call of `step` is one pass over all that is under way. Requests come and go between passes. What an answer
says depends on its prompt, its parameters and its seed alone, never on what else was in the batch, nor on how its
prompt was cut into chunks, nor on whether it was put aside in between.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Ordered
from typing import Any

import numpy as np

from quantmill.errors import BadRequest, Busy, QuantmillError
from quantmill.runtime.engine_scheduler import Chunk, Scheduler
from quantmill.runtime.engine_sequence import Sequence
from quantmill.runtime.engine_types import (
    EmbeddingEvent,
    EngineConfig,
    EngineStats,
    Event,
    FinishEvent,
    PromptEvent,
    Reason,
    Request,
    TokenEvent,
)
from quantmill.runtime.interface import PAGE, Piece, Runtime, RuntimeFacts
from quantmill.runtime.pages import PagePool, pages_for
from quantmill.runtime.sampling import Sampled, begin_rows, check_tokens, picked_rows, score

CUT = 512  # tokens: enough for a matrix product at full speed


class Engine:
    """One runtime, shared by all requests. Not for use from several threads at once: see engine_thread.py."""

    def __init__(self, runtime: Runtime, config: EngineConfig | None = None) -> None:
        self.runtime, self.config = runtime, config or EngineConfig()
        self.facts = runtime.facts
        self.pool = PagePool(self.facts)
        cut = self.config.cut
        if cut is None:
            cut = 0 if self.facts.by_row is None else CUT
        self.scheduler = Scheduler(self.facts, self.pool, self.config.max_running, cut)
        self.overlaps = self.facts.name.startswith(
            "cuda"
        )  # a pass goes on while this thread does other things
        self._requests: dict[str, list[Sequence]] = {}
        self._order = 0
        self._seconds_per_token = 0.0  # of prompt chunks, a moving average
        self._counts: Counter[str] = Counter()
        self._finished: Counter[Reason] = Counter()
        self._busy = 0.0

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    @property
    def waiting(self) -> int:
        """Requests of which no answer has begun."""
        names = {s.request.id for s in self.scheduler.in_line() if not s.begun}
        return sum(not any(s.begun for s in self._requests[name]) for name in names)

    def check(self, request: Request) -> None:
        """Raises BadRequest for a request that can never be served. Safe from any thread."""
        check_request(request, self.facts)

    def add(self, request: Request) -> None:
        """Take a request into the line. Raises BadRequest, and Busy where the line is full."""
        self.check(request)
        if request.id in self._requests:
            raise BadRequest(f"there is a request {request.id} already: choose another id")
        if self.waiting >= self.config.max_waiting:
            raise Busy(f"{self.waiting} requests are waiting already: come back later", self.wait_estimate())
        self.add_checked(request)

    def add_checked(self, request: Request) -> None:
        """`add` for a request that passed `check`, with an id of its own, however long the line is."""
        room = self.facts.context if self.facts.window is not None else self.facts.pages * PAGE
        limit = min(len(request.prompt) + request.params.max_new_tokens, self.facts.context, room)
        line = [Sequence(request, choice, self._order + choice, limit) for choice in range(request.choices)]
        self._order += len(line)
        for sequence in line[1:]:
            sequence.leader = line[0]
        self._requests[request.id] = line
        for sequence in line:
            self.scheduler.add(sequence)

    def wait_estimate(self) -> float:
        """Seconds until a place in the line may be free, by the pace so far; 1 to 60."""
        done = sum(self._finished.values())
        return min(60.0, max(1.0, self._busy / done)) if done else 1.0

    def finish(self, request: str, choice: int | None = None, reason: Reason = Reason.ABORT) -> list[Event]:
        """End one answer, or all of a request, at once. Nothing happens where it has ended already."""
        events: list[Event] = []
        for sequence in list(self._requests.get(request, ())):
            if choice is None or sequence.choice == choice:
                self._end(sequence, reason, events)
        return events

    def finish_all(self, reason: Reason, message: str = "") -> list[Event]:
        events: list[Event] = []
        for sequence in [s for line in self._requests.values() for s in line]:
            self._end(sequence, reason, events, message=message)
        return events

    def step(self, meanwhile: Callable[[], None] = lambda: None) -> list[Event]:
        """One pass -> what came of it, in the order of the sequences' coming.

        meanwhile: called when the pass is under way and nothing is left to do but to wait for its tokens; not
        where no token is drawn.
        """
        began = time.perf_counter()
        chunks = self.scheduler.plan(self._prompt_budget())
        prompt = sum(c.count for c in chunks if c.count > 1 or not c.sequence.answer_tokens)
        events: list[Event] = []
        if answering := [c for c in chunks if not c.sequence.request.embed]:
            self._answer(answering, events, meanwhile)
        if embedding := [c for c in chunks if c.sequence.request.embed]:
            self._embed(embedding, events)
        if chunks:
            self._account(chunks, prompt, time.perf_counter() - began)
        return events

    def stats(self) -> EngineStats:
        return EngineStats(
            waiting=self.waiting,
            running=len(self.scheduler.running),
            pages=self.pool.counts,
            passes=self._counts["passes"],
            prompt_tokens=self._counts["prompt"],
            cached_tokens=self.scheduler.cached_tokens,
            answer_tokens=self._counts["answer"],
            preemptions=self.scheduler.preemptions,
            finished=dict(self._finished),
            busy_seconds=self._busy,
            weight_bytes=self._counts["passes"] * self.facts.bytes_per_token,
        )

    def _prompt_budget(self) -> int:
        if not self._seconds_per_token:
            return 4 * PAGE
        tokens = self.config.pass_seconds / self._seconds_per_token
        return self.facts.max_tokens if math.isinf(tokens) else max(PAGE // 4, int(tokens))

    def _answer(self, chunks: list[Chunk], events: list[Event], meanwhile: Callable[[], None]) -> None:
        pieces = [_piece(c) for c in chunks]
        logits = self.runtime.forward(pieces)
        done: list[tuple[Sequence, int]] = []  # sequences whose next token can be drawn, and their rows
        row = 0
        for chunk, piece in zip(chunks, pieces, strict=True):
            rows = chunk.count if piece.every else 1
            if piece.every:
                self._score(chunk, logits[row : row + rows], events)
            chunk.sequence.advance(chunk.count, self.pool, self._named(chunk.sequence))
            row += rows
            if chunk.sequence.left == 0:
                done.append((chunk.sequence, row - 1))
        if done:
            self._draw(logits, done, events, meanwhile)

    def _named(self, sequence: Sequence) -> int:
        """Positions whose pages others may take over: where cuts matter, of prompts' whole pieces only."""
        cut, request = self.scheduler.cut, sequence.request
        if not self.config.prefix_cache:
            return 0
        if not cut:
            return len(sequence.tokens)
        plain = request.score_prompt is None and not request.embed  # those pass in another way
        return sequence.prompt_tokens // cut * cut if plain else 0

    def _draw(
        self,
        logits: Any,
        done: list[tuple[Sequence, int]],
        events: list[Event],
        meanwhile: Callable[[], None],
    ) -> None:
        rows = [row for _, row in done]
        try:
            masks = [s.matcher.mask() if s.matcher is not None else None for s, _ in done]
            wanted = logits if len(rows) == len(logits) else picked_rows(logits, rows)
            drawing = begin_rows(wanted, [s.state for s, _ in done], masks)
            meanwhile()
            drawn = drawing()
        except QuantmillError as error:  # a model that gives no numbers: nothing in this pass can be trusted
            for sequence, _ in done:
                self._end(sequence, Reason.ERROR, events, message=str(error))
            return
        for (sequence, _), sampled in zip(done, drawn, strict=True):
            self._accept(sequence, sampled, events)

    def _accept(self, sequence: Sequence, sampled: Sampled, events: list[Event]) -> None:
        sequence.logprob += sampled.logprob or 0.0
        self._counts["answer"] += 1
        params, token = sequence.request.params, sampled.token
        ends = token in self.facts.eos_token_ids and not (params.ignore_eos and sequence.matcher is None)
        if ends or token in params.stop_token_ids:
            self._end(sequence, Reason.STOP, events, last=sampled)
            return
        sequence.tokens.append(token)
        events.append(TokenEvent(sequence.request.id, sequence.choice, sampled))
        if sequence.matcher is not None and sequence.matcher.accept(token):
            self._end(sequence, Reason.STOP, events)
        elif len(sequence.tokens) >= sequence.limit:
            self._end(sequence, Reason.LENGTH, events)

    def _score(self, chunk: Chunk, logits: Any, events: list[Event]) -> None:
        """Log probabilities of the prompt's tokens: row i speaks of the token after the i-th of the chunk."""
        sequence, top = chunk.sequence, chunk.sequence.request.score_prompt or 0
        rows = logits if isinstance(logits, np.ndarray) else logits.float().cpu().numpy()
        scores = []
        for row, position in enumerate(range(sequence.computed + 1, sequence.computed + chunk.count + 1)):
            if sequence.scored <= position < sequence.prompt_tokens:
                scores.append(score(rows[row], sequence.tokens[position], top))
        sequence.scored += len(scores)
        if scores:
            events.append(PromptEvent(sequence.request.id, tuple(scores)))

    def _embed(self, chunks: list[Chunk], events: list[Event]) -> None:
        hidden = self.runtime.hidden([_piece(c) for c in chunks])
        row = 0
        for chunk in chunks:
            sequence = chunk.sequence
            part = hidden[row : row + chunk.count].sum(axis=0, dtype=np.float64)
            sequence.hidden = part if sequence.hidden is None else sequence.hidden + part
            row += chunk.count
            # Keys and values are the same as an answer's, but a sum of hidden states has no use for found pages.
            sequence.advance(chunk.count, self.pool, 0)
            if sequence.left == 0:
                mean = (sequence.hidden / len(sequence.tokens)).astype(np.float32)
                events.append(EmbeddingEvent(sequence.request.id, mean))
                self._end(sequence, Reason.STOP, events)

    def _end(
        self,
        sequence: Sequence,
        reason: Reason,
        events: list[Event],
        last: Sampled | None = None,
        message: str = "",
    ) -> None:
        request = sequence.request
        self.scheduler.remove(sequence)
        others = [s for s in self._requests[request.id] if s is not sequence]
        if others:
            self._requests[request.id] = others
        else:
            del self._requests[request.id]
        self._finished[reason] += 1
        said = 0 if request.embed else sequence.answer_tokens + (last is not None)
        logprob, cached = sequence.logprob, sequence.cached
        events.append(FinishEvent(request.id, sequence.choice, reason, last, said, cached, logprob, message))

    def _account(self, chunks: Ordered[Chunk], prompt: int, seconds: float) -> None:
        self._counts["passes"] += 1
        self._counts["prompt"] += prompt
        self._busy += seconds
        if prompt:
            pace = seconds / sum(c.count for c in chunks)
            before = self._seconds_per_token
            self._seconds_per_token = pace if not before else 0.7 * before + 0.3 * pace


def check_request(request: Request, facts: RuntimeFacts) -> None:
    """Raises BadRequest for a request that this model can never serve."""
    size = len(request.prompt)
    if not size:
        raise BadRequest("the prompt is empty: give at least one token")
    if min(request.prompt) < 0 or max(request.prompt) >= facts.vocab_size:
        raise BadRequest(f"the prompt has a token outside the vocabulary of {facts.vocab_size}")
    room = facts.context if facts.window is not None else min(facts.context, facts.pages * PAGE)
    if size + (not request.embed) > room:
        raise BadRequest(f"the prompt has {size} tokens, the context has room for {room}: shorten the prompt")
    check_tokens(request.params, facts.vocab_size)


def _piece(chunk: Chunk) -> Piece:
    sequence = chunk.sequence
    start = sequence.computed
    tokens = sequence.tokens[start : start + chunk.count]
    return Piece(tokens, start, sequence.pages[: pages_for(start + chunk.count)], every=sequence.scoring)
