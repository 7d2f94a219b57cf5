"""The engine's own process: the other end of EngineProcess's wire."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

from quantmill.errors import QuantmillError
from quantmill.runtime.constraints import ConstraintCompiler
from quantmill.runtime.engine import Engine
from quantmill.runtime.engine_thread import EngineThread
from quantmill.runtime.engine_types import (
    EngineConfig,
    EngineStats,
    Event,
    FinishEvent,
    Reason,
    Request,
    TokenEvent,
)
from quantmill.runtime.interface import Runtime
from quantmill.runtime.sampling import Sampled
from quantmill.runtime.tokenizer import TextTokenizer

Opening = Callable[[], tuple[Runtime, TextTokenizer]]  # picklable; runs in the new process


@dataclass(frozen=True, slots=True)
class News:
    """What the parent has to know after a pass."""

    events: list[Any]
    stats: EngineStats
    ahead: int  # requests of which no answer has begun
    taken: int  # requests that have come over the wire so far
    wait: float  # seconds until a place in the line may be free


def unpacked(sent: Any) -> Event:
    if isinstance(sent, tuple):
        request, choice, token = sent
        return TokenEvent(request, choice, Sampled(token))
    event: Event = sent
    return event


def packed(event: Event) -> Any:
    """Most events are plain tokens, and three bare values are quickly sent."""
    if type(event) is TokenEvent and event.sampled.logprob is None:
        return event.request, event.choice, event.sampled.token
    return event


class _Child:
    """The other end, in the new process. Its main thread reads the wire, the engine has a thread of its own."""

    def __init__(
        self, wire: Connection, runtime: Runtime, tokenizer: TextTokenizer, config: EngineConfig
    ) -> None:
        self.wire, self.runtime, self.taken = wire, runtime, 0
        self._sending = threading.Lock()
        facts = runtime.facts
        self._constraints = ConstraintCompiler(tokenizer, facts.vocab_size, facts.eos_token_ids)
        self.engine = EngineThread(Engine(runtime, config), self._deliver)
        self.send("ready", (facts, self._news([])))

    def send(self, what: str, value: Any) -> None:
        with self._sending, contextlib.suppress(OSError):  # the parent has gone: the main thread hears of it
            self.wire.send((what, value))

    def run(self) -> None:
        """Until the parent says so, or is gone."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                what, value = self.wire.recv()
                if what == "close":
                    break
                COMMANDS[what](self, value)
        self.engine.close()
        if self.engine.failure is not None:
            self.send("stopped", self.engine.failure)
        self.runtime.close()

    def submit(self, request: Request) -> None:
        self.taken += 1
        try:
            if request.constraint is not None:
                request = replace(request, matcher=self._constraints.compile(request.constraint))
            self.engine.submit(request)
        except QuantmillError as error:  # the parent checked it: what changed since is told as an end
            ends = [
                FinishEvent(request.id, c, Reason.ERROR, message=str(error)) for c in range(request.choices)
            ]
            self.send("news", self._news(ends))

    def finish(self, value: tuple[str, int | None, Reason]) -> None:
        self.engine.finish(*value)

    def call(self, value: tuple[int, Callable[..., Any], tuple[Any, ...]]) -> None:
        number, function, arguments = value
        try:
            result = function(*arguments)
        except (QuantmillError, RuntimeError, MemoryError, OSError, ValueError) as error:
            result = error
        self.send("called", (number, result))

    def _deliver(self, events: list[Event]) -> None:
        self.send("news", self._news([packed(e) for e in events]))
        if self.engine.failure is not None:
            self.send("stopped", self.engine.failure)

    def _news(self, events: list[Any]) -> News:
        engine = self.engine
        return News(events, engine.stats(), engine.ahead, self.taken, engine.engine.wait_estimate())


COMMANDS: dict[str, Callable[[_Child, Any], None]] = {
    "submit": _Child.submit,
    "finish": _Child.finish,
    "call": _Child.call,
}


def serve(wire: Connection, opening: Opening, config: EngineConfig) -> None:
    """The new process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends us
    try:
        runtime, tokenizer = opening()
    except QuantmillError as error:
        wire.send(("failed", error))
        return
    _Child(wire, runtime, tokenizer, config).run()
