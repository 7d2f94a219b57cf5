"""A desk that talks without a model: it spells out what it was asked, word by word."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from quantmill.errors import SourceNotFound
from quantmill.serve.ui.desk import Loaded, Message, Spoken
from quantmill.serve.ui.store import ModelSettings
from quantmill.types import SamplingParams


class EchoAnswer:
    """Words at a steady pace until they end or are stopped."""

    def __init__(self, words: list[str], params: SamplingParams, pace: float) -> None:
        self.words, self.params, self.pace = words, params, pace
        self.stopped = threading.Event()

    def __iter__(self) -> Iterator[str | Spoken]:
        given = 0
        for word in self.words[: self.params.max_new_tokens]:
            if self.stopped.wait(self.pace):
                break
            given += 1
            yield word
        cut = given < len(self.words)
        finish = "aborted" if self.stopped.is_set() else "length" if cut else "stop"
        yield Spoken(7, given, max(1e-3, given * self.pace), finish)

    def stop(self) -> None:
        self.stopped.set()


class EchoDesk:
    """Answers a question with `You said: QUESTION`; a text is continued with ` and so on`."""

    def __init__(self, folders: dict[str, Path], pace: float = 0.0) -> None:
        self.folders, self.pace = folders, pace
        self.open: dict[str, Loaded] = {}
        self.settings: list[tuple[str, ModelSettings]] = []
        self.asked: list[tuple[str, list[Message], SamplingParams]] = []

    def known(self) -> Sequence[str]:
        return list(self.folders)

    def loaded(self) -> Sequence[Loaded]:
        return list(self.open.values())

    def load(self, name: str, settings: ModelSettings) -> Loaded:
        if name not in self.folders:
            raise SourceNotFound(f"{name} does not exist; name a folder")
        self.settings.append((name, settings))
        context = settings.context or 512
        self.open[name] = Loaded(name, self.folders[name], "echo", context, 4_160_000_000, 70_000_000, True)
        return self.open[name]

    def unload(self, name: str) -> None:
        self.open.pop(name, None)

    def prompt_text(self, name: str, messages: Sequence[Message]) -> str:
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)

    def answer(
        self, name: str, messages: Sequence[Message], params: SamplingParams, *, go_on: bool = False
    ) -> EchoAnswer:
        self.asked.append((name, list(messages), params))
        question = [m["content"] for m in messages if m["role"] == "user"][-1]
        words = [" more"] if go_on else ["You", " said:", *(f" {w}" for w in question.split())]
        return EchoAnswer(words, params, self.pace)

    def go_on(self, name: str, text: str, params: SamplingParams) -> EchoAnswer:
        self.asked.append((name, [{"role": "raw", "content": text}], params))
        return EchoAnswer([" and", " so", " on"], params, self.pace)


def wait_for(what: object, seconds: float = 120.0) -> None:
    """Until `what()` is true."""
    assert callable(what)
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def slow_down(seconds: float) -> None:
    """Every piece of a download takes so long, so that a person can cancel it."""
    from quantmill.hub import download

    fetch = download.fetch

    def slowly(plan: Any, api: Any, advance: Callable[[int], None]) -> Path:
        def told(count: int) -> None:
            time.sleep(seconds)
            advance(count)

        return fetch(plan, api, told)

    download.fetch = slowly


def main(folder: str, pace: str) -> None:
    """Serve the page on a free port of this machine and say where. pace: seconds of a word."""
    import uvicorn
    from starlette.applications import Starlette

    from quantmill.serve.settings import ServeSettings
    from quantmill.serve.ui import put

    slow_down(10 * float(pace))
    app = Starlette()
    put(app, EchoDesk({"demo/echo": Path(folder)}, float(pace)), ServeSettings())
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    threading.Thread(target=server.run, daemon=True).start()
    wait_for(lambda: server.started, 120)
    print(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/ui/", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
