"""A server over toy models, in a thread of the test's own process."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvicorn

from quantmill.errors import BadCheckpoint
from quantmill.runtime.llm import LLM
from quantmill.serve.app import create_app
from quantmill.serve.models import ModelService
from quantmill.serve.settings import ServeSettings
from toy_llm import toy_llm

Start = Callable[..., "Running"]


class Running:
    """A server that takes connections. `opened` lists the sources in the order of their loading."""

    def __init__(
        self, settings: ServeSettings, models: tuple[str, ...], budget: int, **runtime: object
    ) -> None:
        self.opened: list[str] = []
        self.llms: dict[str, LLM] = {}
        self.service = ModelService(lambda source: self._open(source, runtime), budget)
        for name in models:
            self.service.register(name)
        app = create_app(self.service, settings)
        config = uvicorn.Config(app, port=0, log_config=None, access_log=False, lifespan="off")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        until = time.monotonic() + 120
        while not self.server.started and time.monotonic() < until:
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def _open(self, source: str, runtime: dict[str, object]) -> tuple[Path, LLM]:
        if source == "broken":
            raise BadCheckpoint("/home/somebody/broken has no weights: download it again")
        self.opened.append(source)
        self.llms[source] = llm = toy_llm(**runtime)
        return Path(source), llm

    def _run(self) -> None:
        async def live() -> None:
            self.service.loop = asyncio.get_running_loop()
            await self.server.serve()
            await self.service.close()

        with asyncio.Runner() as runner:
            runner.run(live())

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()


@pytest.fixture
def start() -> Iterator[Start]:
    """Start servers; they end with the test."""
    with contextlib.ExitStack() as stack:

        def begin(
            settings: ServeSettings | None = None,
            models: tuple[str, ...] = ("toy", "other"),
            budget: int = 1 << 40,
            **runtime: object,
        ) -> Running:
            running = Running(settings or ServeSettings(), models, budget, **runtime)
            stack.callback(running.stop)
            return running

        yield begin


@pytest.fixture(scope="module")
def toy() -> Iterator[Running]:
    """One server for a module's harmless requests."""
    running = Running(ServeSettings(), ("toy", "other", "owner/name:main"), 1 << 40)
    yield running
    running.stop()
