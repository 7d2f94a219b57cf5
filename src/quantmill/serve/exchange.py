"""One request to a model, from the door to the last token: access, the model, its answer, times and a log line."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

from starlette.requests import Request

from quantmill.errors import QuantmillError
from quantmill.runtime.llm import LLM
from quantmill.runtime.llm_text import Delta
from quantmill.serve.access import Access, Caller
from quantmill.serve.metrics import Metrics
from quantmill.serve.models import ModelService
from quantmill.serve.refusal import Refusal, unavailable
from quantmill.serve.refusal import of as refusal_of
from quantmill.serve.settings import ServeSettings

log = logging.getLogger("quantmill.serve")


@dataclass(frozen=True, slots=True)
class Server:
    """What all handlers share."""

    settings: ServeSettings
    service: ModelService
    access: Access
    metrics: Metrics

    @asynccontextmanager
    async def using(self, name: str, caller: Caller) -> AsyncIterator[LLM]:
        """`ModelService.using`, which tells callers no more than concerns them. Raises Refusal, too."""
        async with AsyncExitStack() as stack:
            try:
                llm = await stack.enter_async_context(self.service.using(name))
            except QuantmillError as error:
                raise unavailable(name, error, self.service.source(name), caller.admin) from error
            yield llm


@dataclass
class Exchange:
    """`open` gives the model; what the handler notes meanwhile ends up in the log and the metrics."""

    server: Server
    path: str
    caller: Caller
    model: str
    prefix: str  # of the id: chatcmpl, cmpl
    began: float = field(default_factory=time.perf_counter)
    created: int = field(default_factory=lambda: int(time.time()))
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    status: int = 200
    error: str | None = None
    _first: float | None = None
    _last: float = 0.0

    def __post_init__(self) -> None:
        self.id = f"{self.prefix}-{secrets.token_hex(12)}"

    @asynccontextmanager
    async def open(self) -> AsyncIterator[LLM]:
        """Raises Refusal for whatever goes wrong, inside too."""
        try:
            with self.server.access.enter(self.caller):
                async with self.server.using(self.model, self.caller) as llm:
                    yield llm
        except Refusal as refusal:
            self.status, self.error = refusal.status, str(refusal.__cause__ or refusal.message)
            raise
        except QuantmillError as error:
            told = refusal_of(error)
            self.status, self.error = told.status, told.message
            raise told from error
        except (GeneratorExit, asyncio.CancelledError):  # the client has left
            self.status = 499
            raise
        finally:
            self._note()

    def check_prompt(self, size: int) -> None:
        """Raises Refusal for a prompt longer than this server takes."""
        self.prompt_tokens += size
        most = self.server.settings.max_prompt_tokens
        if most is not None and size > most:
            raise Refusal(
                400, f"the prompt has {size} tokens, this server takes {most}", code="context_length_exceeded"
            )

    def saw(self, deltas: list[Delta]) -> None:
        """Tokens have come."""
        now = time.perf_counter()
        if any(d.tokens for d in deltas):
            if self._first is None:
                self._first = now
                self.server.metrics.first.labels(self.model).observe(now - self.began)
            else:
                self.server.metrics.between.labels(self.model).observe(now - self._last)
            self._last = now
        for delta in deltas:
            if delta.ending is not None:
                self.completion_tokens += delta.ending.completion_tokens
                self.cached_tokens = max(self.cached_tokens, delta.ending.cached_tokens)

    def usage(self) -> dict[str, object]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    def _note(self) -> None:
        seconds = time.perf_counter() - self.began
        self.server.metrics.whole.labels(self.model if self.status != 404 else "unknown").observe(seconds)
        facts = {
            "id": self.id,
            "path": self.path,
            "caller": self.caller.name,
            "model": self.model,
            "status": self.status,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "seconds": round(seconds, 4),
            "first_token": None if self._first is None else round(self._first - self.began, 4),
        }
        log.info("request", extra=facts | ({"error": self.error} if self.error else {}))


def server_of(request: Request) -> Server:
    server = request.app.state.server
    assert isinstance(server, Server)
    return server
