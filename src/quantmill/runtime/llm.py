"""Text in, text out: a model with its tokenizer and an engine that serves many callers at once.

    LLM("owner/name:branch").generate(["Once upon"], SamplingParams(max_new_tokens=20))

Everything is there for threads (`generate`, `stream`) and for event loops (`agenerate`, `astream`). Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np

from quantmill.errors import BadRequest
from quantmill.runtime.constraints import Constraint, ConstraintCompiler
from quantmill.runtime.engine import Engine
from quantmill.runtime.engine_child import Opening
from quantmill.runtime.engine_process import EngineProcess
from quantmill.runtime.engine_thread import EngineThread
from quantmill.runtime.engine_types import EngineConfig, Reason, Request
from quantmill.runtime.interface import Floats, Runtime, RuntimeFacts
from quantmill.runtime.llm_mail import Box, LoopBox, Post, ThreadBox
from quantmill.runtime.llm_text import Answer, Delta, Reply
from quantmill.runtime.tokenizer import Message, TextTokenizer, open_tokenizer
from quantmill.types import SamplingParams

Prompt = str | Sequence[int]  # text, or token ids as they are
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Job:
    """A prompt and how it is to be answered."""

    prompt: Prompt
    params: SamplingParams = field(default_factory=SamplingParams)
    constraint: Constraint | None = None
    client: str = ""  # the engine is fair between these
    score_prompt: int | None = None  # report the prompt's log probabilities with so many alternatives
    embed: bool = False


class LLM:
    """A model ready to answer. `close` it, or use it in a `with` statement."""

    def __init__(
        self,
        model: str | Path,
        *,
        device: str = "auto",
        threads: int | None = None,
        exact: bool = False,
        context: int | None = None,
        kv_tokens: int | None = None,
        tensor_parallel: int = 1,
        engine: EngineConfig | None = None,
        apart: bool = False,
    ) -> None:
        """model: a folder, a .gguf file or owner/name[:branch]; kv_tokens: positions that the cache holds;
        tensor_parallel: processes that share every layer; apart: the model and its engine in a process of their
        own (a script then needs `if __name__ == "__main__":`).

        Raises SourceNotFound, UnsupportedModel, BadCheckpoint, BadRequest.
        """
        from quantmill.runtime.opening import open_runtime
        from quantmill.sources import resolve

        folder = resolve(str(model), run=True)
        tokenizer = open_tokenizer(folder)
        opening = partial(
            open_runtime,
            folder,
            device=device,
            threads=threads,
            exact=exact,
            context=context,
            kv_tokens=kv_tokens,
            tensor_parallel=tensor_parallel,
        )
        if apart:
            self._start_apart(partial(_open_both, opening, folder), tokenizer, engine)
        else:
            self._start(opening(), tokenizer, engine)

    @classmethod
    def over(cls, runtime: Runtime, tokenizer: TextTokenizer, engine: EngineConfig | None = None) -> Self:
        """The same over a runtime that is open."""
        self = cls.__new__(cls)
        self._start(runtime, tokenizer, engine)
        return self

    @classmethod
    def over_process(
        cls, opening: Opening, tokenizer: TextTokenizer, engine: EngineConfig | None = None
    ) -> Self:
        """The same over a runtime that `opening` opens in a process of its own. Raises what it raises."""
        self = cls.__new__(cls)
        self._start_apart(opening, tokenizer, engine)
        return self

    def _start(self, runtime: Runtime, tokenizer: TextTokenizer, config: EngineConfig | None) -> None:
        self.runtime: Runtime | None = runtime  # None: it is in another process
        self._post = Post()
        self.engine: EngineThread | EngineProcess = EngineThread(Engine(runtime, config), self._post.deliver)
        self._know(runtime.facts, tokenizer)

    def _start_apart(self, opening: Opening, tokenizer: TextTokenizer, config: EngineConfig | None) -> None:
        self.runtime, self._post = None, Post()
        self.engine = engine = EngineProcess(opening, self._post.deliver, config)
        self._know(engine.facts, tokenizer)

    def _know(self, facts: RuntimeFacts, tokenizer: TextTokenizer) -> None:
        self.facts, self.tokenizer = facts, tokenizer
        self.constraints = ConstraintCompiler(tokenizer, facts.vocab_size, facts.eos_token_ids)
        self._numbers = itertools.count()

    def beside(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Run a function in the process that holds the model. It must leave the runtime alone."""
        if isinstance(self.engine, EngineProcess):
            result: Result = self.engine.call(function, *arguments)
            return result
        return function(*arguments)

    def close(self) -> None:
        """End what is under way and give the model's memory back."""
        self.engine.close()
        if self.runtime is not None:
            self.runtime.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        constraint: Constraint | None = None,
    ) -> list[Answer]:
        """Answer prompts (texts or lists of token ids), all at once -> answers in the same order.

        params: for all, or one for each. Texts are continued as they are: see `chat`. Raises BadRequest.
        """
        jobs = _jobs(prompts, params, constraint)
        answers: list[Answer | None] = [None] * len(jobs)
        under_way: dict[str, tuple[int, Reply]] = {}
        box, left = ThreadBox(), list(enumerate(jobs))[::-1]
        most = self.engine.max_waiting
        try:
            while left or under_way:
                while left and len(under_way) < most:
                    number, job = left.pop()
                    name, reply = self._submit(job, box)
                    under_way[name] = (number, reply)
                for event in box.get():
                    number, reply = under_way[event.request]
                    reply.feed([event])
                    if reply.done:
                        del under_way[event.request]
                        self._post.close(event.request)
                        answers[number] = reply.answer()
        finally:
            for name in under_way:
                self._leave(name)
        return [a for a in answers if a is not None]

    def stream(self, job: Job) -> Iterator[Delta]:
        """The answer piece by piece. Closing the iterator ends the work at once."""
        box = ThreadBox()
        name, reply = self._submit(job, box)
        try:
            while not reply.done:
                yield from reply.feed(box.get())
        finally:
            self._leave(name)

    async def astream(self, job: Job) -> AsyncIterator[list[Delta]]:
        """The same in an event loop, in lists of all that is new. Cancelling ends the work at once."""
        async with self.reply(job) as (reply, box):
            while not reply.done:
                yield reply.feed(await box.get())

    async def agenerate(self, job: Job) -> Answer:
        """One answer, whole, in an event loop."""
        async with self.reply(job) as (reply, box):
            while not reply.done:
                reply.feed(await box.get())
            return reply.answer()

    def reply(self, job: Job) -> OpenReply:
        """What `astream` and `agenerate` are made of: `async with` gives the reply and the box that its events
        come to."""
        return OpenReply(self, job)

    def chat_ids(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        template: str | None = None,
    ) -> list[int]:
        """A conversation as a prompt for `generate` and `Job`."""
        return self.tokenizer.chat_ids(messages, tools=tools, template=template)

    def embed(self, texts: Sequence[Prompt]) -> Floats:
        """Means of the last hidden states, of length 1: (texts, hidden_size) float32."""
        boxes = [ThreadBox() for _ in texts]
        names = [self._submit(Job(t, embed=True), b) for t, b in zip(texts, boxes, strict=True)]
        vectors = []
        for (name, reply), box in zip(names, boxes, strict=True):
            while not reply.done:
                reply.feed(box.get())
            self._leave(name)
            vectors.append(unit(reply.embedding))
        return np.stack(vectors)

    def ids(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a text with the tokens that begin it; ids as they are."""
        return tuple(self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)

    async def aids(self, prompt: Prompt) -> tuple[int, ...]:
        """The same in an event loop, which goes on meanwhile."""
        return tuple(await self.tokenizer.aencode(prompt) if isinstance(prompt, str) else prompt)

    def _submit(self, job: Job, box: Box) -> tuple[str, Reply]:
        matcher = self.constraints.compile(job.constraint) if job.constraint is not None else None
        name, ids = str(next(self._numbers)), self.ids(job.prompt)
        params = replace(job.params, n=1, best_of=None) if job.embed else job.params
        reply = Reply(ids, params, self.tokenizer, lambda choice: self._stop_string(name, choice))
        request = Request(name, ids, params, job.client, matcher, job.constraint, job.score_prompt, job.embed)
        self._post.open(name, box)
        try:
            self.engine.submit(request)
        except BaseException:
            self._post.close(name)
            raise
        return name, reply

    def _stop_string(self, name: str, choice: int) -> None:
        self.engine.finish(name, choice, Reason.STOP)

    def _leave(self, name: str) -> None:
        """Nobody waits for this request any more; nothing happens where it has ended."""
        self._post.close(name)
        self.engine.finish(name)


class OpenReply:
    """A request as a context: leaving it, by whatever way, ends what is under way."""

    def __init__(self, llm: LLM, job: Job) -> None:
        self._llm, self._job = llm, job

    async def __aenter__(self) -> tuple[Reply, LoopBox]:
        box = LoopBox(asyncio.get_running_loop())
        self._name, reply = self._llm._submit(self._job, box)
        return reply, box

    async def __aexit__(self, *_: object) -> None:
        self._llm._leave(self._name)


def _open_both(opening: Callable[[], Runtime], folder: Path) -> tuple[Runtime, TextTokenizer]:
    """In the engine's own process."""
    return opening(), open_tokenizer(folder)


def unit(vector: Floats | None) -> Floats:
    """The vector with length 1."""
    if vector is None:
        raise BadRequest("the request asked for no embedding")
    return np.asarray(vector / max(float(np.linalg.norm(vector)), 1e-12), np.float32)


def _jobs(
    prompts: Prompt | Sequence[Prompt],
    params: SamplingParams | Sequence[SamplingParams] | None,
    constraint: Constraint | None,
) -> list[Job]:
    """One job for each prompt. A list of numbers is one prompt."""
    single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
    listed: list[Any] = [prompts] if single else list(prompts)
    if params is None or isinstance(params, SamplingParams):
        params = [params or SamplingParams()] * len(listed)
    if len(params) != len(listed):
        raise BadRequest(
            f"{len(params)} sets of parameters for {len(listed)} prompts: give one, or one for each"
        )
    return [Job(p, q, constraint) for p, q in zip(listed, params, strict=True)]
