"""The engine in a thread of its own: requests from any thread, events to one listener.

The listener is called in the engine's thread, once for every pass: it must only hand the events on. Where passes
are a GPU's, that is while the next one is under way, so that telling costs no time.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

from quantmill.errors import Busy, QuantmillError
from quantmill.runtime.engine import Engine
from quantmill.runtime.engine_types import EngineStats, Event, Reason, Request

Deliver = Callable[[list[Event]], None]


class EngineThread:
    """Starts at once; `close` ends it. Every request that was taken gets its FinishEvents, come what may."""

    def __init__(self, engine: Engine, deliver: Deliver, name: str = "engine") -> None:
        self.engine, self._deliver = engine, deliver
        self._changed = threading.Condition()
        self._inbox: deque[Request] = deque()
        self._endings: deque[tuple[str, int | None, Reason]] = deque()
        self._waiting = 0  # in the engine, as of its last look into the inbox
        self._stats = engine.stats()
        self._idle = True
        self._open, self._going = True, True
        self._held: list[Event] = []  # not told yet
        self.failure: str | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self.failure is None

    @property
    def max_waiting(self) -> int:
        return self.engine.config.max_waiting

    @property
    def ahead(self) -> int:
        """Requests of which no answer has begun."""
        return self._waiting + len(self._inbox)

    def stats(self) -> EngineStats:
        """As of the last pass."""
        return self._stats

    def submit(self, request: Request) -> None:
        """Take a request in. Raises BadRequest, Busy where the line is full, QuantmillError where the engine
        has stopped."""
        self.engine.check(request)
        with self._changed:
            if self.failure is not None:
                raise QuantmillError(f"the engine has stopped: {self.failure}; start again")
            if not self._open:
                raise Busy("the engine is shutting down", retry_after=10)
            if self.ahead >= self.max_waiting:
                raise Busy(
                    f"{self.ahead} requests are waiting already: come back later", self.engine.wait_estimate()
                )
            self._inbox.append(request)
            self._idle = False
            self._changed.notify_all()

    def finish(self, request: str, choice: int | None = None, reason: Reason = Reason.ABORT) -> None:
        """End an answer, or all of a request, before the next pass."""
        with self._changed:
            self._endings.append((request, choice, reason))
            self._changed.notify_all()

    def drain(self, seconds: float) -> bool:
        """Take nothing new and wait until all is answered -> whether it was in time."""
        with self._changed:
            self._open = False
            return self._changed.wait_for(lambda: self._idle or not self._thread.is_alive(), seconds)

    def close(self) -> None:
        """End at once what is under way, and the thread."""
        with self._changed:
            self._open = self._going = False
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._going:
                self._held += self._take_in()
                self._pass()
            self._stop("the engine was closed", Reason.ABORT)
        except Exception as error:  # whatever a back end throws: nobody may wait for ever
            self.failure = f"{type(error).__name__}: {error}"
            logging.getLogger(__name__).exception("the engine stopped")
            self._stop(self.failure, Reason.ERROR)

    def _pass(self) -> None:
        if self.engine.overlaps and self.engine.has_work:
            events = self.engine.step(self._tell)
            if self._held:  # no token was drawn in this pass
                self._tell()
            self._held = events
            late = bool(self.engine.has_work)
        else:
            self._held += self.engine.step() if self.engine.has_work else []
            late = False
        if not late:
            self._tell()

    def _tell(self) -> None:
        self._stats = self.engine.stats()
        self._waiting = self._stats.waiting
        held, self._held = self._held, []
        self._deliver(held)

    def _take_in(self) -> list[Event]:
        """What came since the last pass; waits where there is nothing to do."""
        with self._changed:
            self._idle = not (self.engine.has_work or self._inbox)
            if self._idle:
                self._changed.notify_all()
            self._changed.wait_for(self._wanted)
            arrived, self._inbox = self._inbox, deque()
            endings, self._endings = self._endings, deque()
            for request in arrived:
                self.engine.add_checked(request)
            self._waiting = self.engine.waiting
        events: list[Event] = []
        for name, choice, reason in endings:
            events += self.engine.finish(name, choice, reason)
        return events

    def _wanted(self) -> bool:
        return bool(self.engine.has_work or self._inbox or self._endings or not self._going)

    def _stop(self, message: str, reason: Reason) -> None:
        with self._changed:
            self._open = False
            for request in self._inbox:
                self.engine.add_checked(request)
            self._inbox.clear()
            self._idle = True
            self._changed.notify_all()
        self._held += self.engine.finish_all(reason, message)
        self._tell()
