"""The engine in a process of its own: what EngineThread is, beside a server that is busy with other things.

Python lets one thread of a process run at a time. A GPU's pass of a few milliseconds leaves no time to wait for a
front that writes to sockets, so where passes are that short the two do not share an interpreter. Memory goes back
with the process, and a GPU that fails takes only this process with it.

What goes over the wire: requests and endings there; facts, events and figures back, once for every pass.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from quantmill.errors import BadRequest, Busy, QuantmillError
from quantmill.runtime.engine import check_request
from quantmill.runtime.engine_child import News, Opening, serve, unpacked
from quantmill.runtime.engine_thread import Deliver
from quantmill.runtime.engine_types import (
    EngineConfig,
    EngineStats,
    Event,
    FinishEvent,
    Reason,
    Request,
)
from quantmill.runtime.interface import RuntimeFacts

ENOUGH = 20.0  # seconds that a process is given to end


class EngineProcess:
    """The same methods as EngineThread's. Every request that was taken gets its FinishEvents, come what may."""

    def __init__(self, opening: Opening, deliver: Deliver, config: EngineConfig | None = None) -> None:
        """Waits until the model is open. Raises what `opening` raises, QuantmillError where the process dies."""
        self.config, self._deliver = config or EngineConfig(), deliver
        self._changed = threading.Condition()
        self._under_way: dict[str, set[int]] = {}  # choices that have not ended, by request
        self._sent, self._open = 0, True
        self._calls: dict[int, list[Any]] = {}
        self._numbers = itertools.count()
        self.failure: str | None = None
        context = multiprocessing.get_context("spawn")
        self._wire, there = context.Pipe()
        self._process = context.Process(
            target=serve, args=(there, opening, self.config), name="engine", daemon=True
        )
        self._process.start()
        there.close()
        self.facts, self._news = self._opened()
        self._reader = threading.Thread(target=self._read, name="engine reader", daemon=True)
        self._reader.start()

    @property
    def alive(self) -> bool:
        return self._process.is_alive() and self.failure is None

    @property
    def max_waiting(self) -> int:
        return self.config.max_waiting

    @property
    def ahead(self) -> int:
        """Requests of which no answer has begun, those on their way included."""
        return self._news.ahead + self._sent - self._news.taken

    def stats(self) -> EngineStats:
        """As of the last pass."""
        return self._news.stats

    def submit(self, request: Request) -> None:
        """See EngineThread.submit. A request's matcher does not travel, its constraint does."""
        check_request(request, self.facts)
        with self._changed:
            if self.failure is not None:
                raise QuantmillError(f"the engine has stopped: {self.failure}; start again")
            if not self._open:
                raise Busy("the engine is shutting down", retry_after=10)
            if self.ahead >= self.max_waiting:
                raise Busy(f"{self.ahead} requests are waiting already: come back later", self._news.wait)
            if request.id in self._under_way:
                raise BadRequest(f"there is a request {request.id} already: choose another id")
            self._under_way[request.id] = set(range(request.choices))
            self._sent += 1
            self._send("submit", replace(request, matcher=None))

    def finish(self, request: str, choice: int | None = None, reason: Reason = Reason.ABORT) -> None:
        """End an answer, or all of a request, before the next pass."""
        with self._changed:
            if request in self._under_way:
                self._send("finish", (request, choice, reason))

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The function's result, run in the engine's process while passes go on: it must leave the runtime alone.

        Raises what it raises, and QuantmillError where the process ends before.
        """
        with self._changed:
            number, answer = next(self._numbers), list[Any]()
            self._calls[number] = answer
            self._send("call", (number, function, arguments))
            self._changed.wait_for(lambda: answer or self.failure is not None or not self._reader.is_alive())
            del self._calls[number]
        if not answer:
            raise QuantmillError(f"the engine has stopped: {self.failure}; start again")
        if isinstance(answer[0], BaseException):
            raise answer[0]
        return answer[0]

    def drain(self, seconds: float) -> bool:
        """Take nothing new and wait until all is answered -> whether it was in time."""
        with self._changed:
            self._open = False
            return self._changed.wait_for(lambda: not self._under_way or not self.alive, seconds)

    def close(self) -> None:
        """End at once what is under way, and the process."""
        with self._changed:
            self._open = False
            self._send("close", None)
        self._reader.join(ENOUGH)
        self._process.join(ENOUGH)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._reader.join()
        self._wire.close()

    def _opened(self) -> tuple[RuntimeFacts, News]:
        try:
            said, found = self._wire.recv()
        except EOFError:
            self._process.join()
            raise QuantmillError(
                f"the engine's process ended with code {self._process.exitcode} before the model was open: "
                "is there enough memory?"
            ) from None
        if said == "failed":
            self._process.join()
            raise found
        facts, news = found
        return facts, news

    def _send(self, what: str, value: Any) -> None:
        with contextlib.suppress(OSError):  # it has ended: the reader tells
            self._wire.send((what, value))

    def _read(self) -> None:
        """In a thread: what the process tells, until it ends."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                said, value = self._wire.recv()
                if said == "news":
                    self._hear(value)
                elif said == "called":
                    with self._changed:
                        self._calls.get(value[0], []).append(value[1])
                        self._changed.notify_all()
                elif said == "stopped":
                    self.failure = value
        self._process.join(ENOUGH)
        self._end()

    def _hear(self, news: News) -> None:
        events = [unpacked(e) for e in news.events]
        with self._changed:
            self._news = news
            for event in events:
                if isinstance(event, FinishEvent):
                    self._ended(event)
            self._changed.notify_all()
        self._deliver(events)

    def _ended(self, event: FinishEvent) -> None:
        choices = self._under_way.get(event.request, set())
        choices.discard(event.choice)
        if not choices:
            self._under_way.pop(event.request, None)

    def _end(self) -> None:
        """The process is gone: nobody may wait for ever."""
        with self._changed:
            if self._open and self.failure is None:
                self.failure = f"the engine's process ended with code {self._process.exitcode}"
            reason = Reason.ABORT if self.failure is None else Reason.ERROR
            message = self.failure or "the engine was closed"
            left, self._under_way = self._under_way, {}
            self._open = False
            self._changed.notify_all()
        lost: list[Event] = [
            FinishEvent(request, choice, reason, message=message)
            for request, choices in left.items()
            for choice in sorted(choices)
        ]
        if lost:
            self._deliver(lost)
