"""Events from the engine's thread to whoever waits for them: a thread or a task of an event loop."""

from __future__ import annotations

import asyncio
import queue
from threading import Lock

from quantmill.runtime.engine_types import Event


class ThreadBox:
    """For a thread that waits."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()

    def put(self, events: list[Event]) -> None:
        self._queue.put(events)

    def get(self) -> list[Event]:
        """All that came since the last call; waits for the first."""
        return self._queue.get()


class LoopBox:
    """For a task. Only `post` may be called from elsewhere, and through the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._events: list[Event] = []
        self._waiter: asyncio.Future[None] | None = None

    def put(self, events: list[Event]) -> None:
        self._events += events
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> list[Event]:
        """All that came since the last call; waits for the first. What comes faster than it is fetched comes
        together."""
        if not self._events:
            self._waiter = self.loop.create_future()
            await self._waiter
            self._waiter = None
        events, self._events = self._events, []
        return events


Box = ThreadBox | LoopBox


class Post:
    """The engine thread's listener: sorts events by request. One call into each event loop per pass."""

    def __init__(self) -> None:
        self._boxes: dict[str, Box] = {}
        self._lock = Lock()

    def open(self, request: str, box: Box) -> None:
        with self._lock:
            self._boxes[request] = box

    def close(self, request: str) -> None:
        """What still comes for this request is dropped."""
        with self._lock:
            self._boxes.pop(request, None)

    def deliver(self, events: list[Event]) -> None:
        sorted_: dict[str, list[Event]] = {}
        for event in events:
            sorted_.setdefault(event.request, []).append(event)
        loops: dict[asyncio.AbstractEventLoop, list[tuple[LoopBox, list[Event]]]] = {}
        with self._lock:
            found = [(self._boxes.get(request), mail) for request, mail in sorted_.items()]
        for box, mail in found:
            if isinstance(box, LoopBox):
                loops.setdefault(box.loop, []).append((box, mail))
            elif box is not None:
                box.put(mail)
        for loop, letters in loops.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(_put_all, letters)


def _put_all(letters: list[tuple[LoopBox, list[Event]]]) -> None:
    for box, mail in letters:
        box.put(mail)
