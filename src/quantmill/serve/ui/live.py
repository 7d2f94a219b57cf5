"""The desk over the server's own models: the page and the API share them.

Handlers run in worker threads; the models are loaded and dropped in the server's event loop.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from typing import Any, TypeVar

from quantmill.errors import BadRequest, QuantmillError
from quantmill.runtime.engine_types import Reason
from quantmill.runtime.llm import LLM, Job
from quantmill.serve.models import ModelInfo, ModelService
from quantmill.serve.settings import ServeSettings
from quantmill.serve.ui.desk import Loaded, Message, Spoken
from quantmill.serve.ui.store import ModelSettings
from quantmill.types import SamplingParams

Result = TypeVar("Result")
FINISH = {Reason.STOP: "stop", Reason.LENGTH: "length", Reason.ABORT: "aborted", Reason.ERROR: "error"}


class LiveAnswer:
    """One answer of a model, in one thread; `stop` comes from another."""

    def __init__(self, desk: LiveDesk, name: str, prompt: Sequence[int], params: SamplingParams) -> None:
        self._desk, self._name = desk, name
        self._job, self._prompt = Job(prompt, params, client="web ui"), len(prompt)
        self._stopped = threading.Event()

    def __iter__(self) -> Iterator[str | Spoken]:
        began, tokens, finish = time.perf_counter(), 0, "aborted"
        with self._desk.holding(self._name) as llm, closing(llm.stream(self._job)) as deltas:  # type: ignore[type-var]
            for delta in deltas:
                tokens += len(delta.tokens)
                if delta.text:
                    yield delta.text
                if delta.ending is not None:
                    tokens, finish = delta.ending.completion_tokens, FINISH[delta.ending.reason]
                if self._stopped.is_set():
                    break
        yield Spoken(self._prompt, tokens, time.perf_counter() - began, finish)

    def stop(self) -> None:
        self._stopped.set()


class LiveDesk:
    """See desk.Desk."""

    def __init__(self, service: ModelService, settings: ServeSettings) -> None:
        self.service, self.settings = service, settings
        self._asked: dict[str, ModelSettings] = {}  # what each loaded model was loaded with

    def known(self) -> Sequence[str]:
        return [i.name for i in self.service.infos()]

    def loaded(self) -> Sequence[Loaded]:
        ready = dict(self.service.ready())
        return [_loaded(i, ready[i.name]) for i in self.service.infos() if i.name in ready]

    def load(self, name: str, settings: ModelSettings) -> Loaded:
        new = [] if name in self.known() else self.service.register(name)
        info = self.service.info(name)
        wanted = replace(settings, sampling=SamplingParams(), system="")
        if info.state == "ready" and self._asked.get(name, ModelSettings()) != wanted:
            self.unload(name)
        self.service.overrides[info.source] = self._changed(settings)
        try:
            self._wait(self.service.load(name))
        except QuantmillError:
            self.service.forget(new)
            raise
        self._asked[name] = wanted
        return next(m for m in self.loaded() if m.name == name)

    def unload(self, name: str) -> None:
        self._wait(self.service.unload(name))
        self._asked.pop(name, None)

    def prompt_text(self, name: str, messages: Sequence[Message]) -> str:
        last = messages[-1] if messages else None
        tokenizer = self._llm(name).tokenizer
        if last and last["role"] == "assistant":
            return tokenizer.chat_text(messages[:-1]) + last["content"]
        return tokenizer.chat_text(messages)

    def answer(
        self, name: str, messages: Sequence[Message], params: SamplingParams, *, go_on: bool = False
    ) -> LiveAnswer:
        llm = self._llm(name)
        if not llm.tokenizer.has_template:
            raise BadRequest(f"{name} has no chat template: choose the mode Raw text")
        text = self.prompt_text(name, messages) if go_on else llm.tokenizer.chat_text(messages)
        return LiveAnswer(self, name, llm.tokenizer.encode(text, special=False), params)

    def go_on(self, name: str, text: str, params: SamplingParams) -> LiveAnswer:
        return LiveAnswer(self, name, self._llm(name).ids(text), params)

    @contextmanager
    def holding(self, name: str) -> Iterator[LLM]:
        """The model, which nobody drops meanwhile. Raises BadRequest where it is not loaded."""
        llm = self._wait(self.service.hold(name))
        try:
            yield llm
        finally:
            with suppress(RuntimeError):  # the loop has ended, and the models with it
                self.loop.call_soon_threadsafe(self.service.let_go, name)

    def _llm(self, name: str) -> LLM:
        llm = dict(self.service.ready()).get(name)
        if llm is None:
            raise BadRequest(f"{name} is not loaded: pick it on the tab Model")
        return llm

    def _changed(self, s: ModelSettings) -> ServeSettings:
        return replace(
            self.settings,
            device=s.device if s.device != "auto" else self.settings.device,
            threads=s.threads or self.settings.threads,
            context=s.context or self.settings.context,
            exact=s.exact or self.settings.exact,
        )

    def _wait(self, work: Coroutine[Any, Any, Result]) -> Result:
        try:
            loop = self.loop
        except QuantmillError:
            work.close()
            raise
        return asyncio.run_coroutine_threadsafe(work, loop).result()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The server's. Raises QuantmillError before it has one."""
        if self.service.loop is None:
            raise QuantmillError("the server has not started: wait a moment")
        return self.service.loop


def _loaded(info: ModelInfo, llm: LLM) -> Loaded:
    facts = llm.facts
    assert info.folder is not None  # a model that is ready has one
    cache = facts.pages * facts.bytes_per_page
    has_template = llm.tokenizer.has_template
    return Loaded(info.name, info.folder, facts.name, facts.context, info.bytes - cache, cache, has_template)
