"""Answers that come piece by piece (server-sent events), and answers that nobody waits for any more.

When a client leaves, what it asked for is cancelled, whether it was streamed or not.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from quantmill.types import Json

DONE = b"data: [DONE]\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # a proxy that waits for more would make a stream pointless
]


class EventStream(Response):
    """Sends what a generator yields. `first` was yielded already: errors before it have a status of their own."""

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes, None]) -> None:
        self.first, self.rest, self.background = first, rest, None
        self.status_code = 200

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pump = asyncio.create_task(self._pump(send))
        gone = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({pump, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not pump.done():
                pump.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                await pump
            await self.rest.aclose()

    async def _pump(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        await send({"type": "http.response.body", "body": self.first, "more_body": True})
        async for chunk in self.rest:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def stream(events: AsyncGenerator[bytes, None]) -> Response:
    """Raises what the generator raises before its first event."""
    try:
        return EventStream(await anext(events), events)
    except BaseException:
        await events.aclose()
        raise


async def whole(request: Request, work: Coroutine[Any, Any, Json]) -> Response:
    """The document that `work` returns, unless the client leaves before."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_gone(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            return Response(status_code=499)  # nobody reads it; the number is nginx's
        return JSONResponse(task.result())
    finally:
        gone.cancel()
        task.cancel()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
