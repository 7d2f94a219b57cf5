"""POST /v1/completions: texts or token ids are continued as they are."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from quantmill.errors import QuantmillError
from quantmill.runtime.llm import LLM, Job
from quantmill.runtime.llm_text import Answer, Choice, Delta
from quantmill.serve.body import read_model
from quantmill.serve.chat import finish_reason
from quantmill.serve.exchange import Exchange, server_of
from quantmill.serve.logprobs import completion_logprobs
from quantmill.serve.params import completion_params, constraint_of
from quantmill.serve.refusal import invalid, of
from quantmill.serve.schemas import CompletionRequest
from quantmill.serve.sse import DONE, stream, whole
from quantmill.types import Json


async def completions(request: Request) -> Response:
    server = server_of(request)
    caller = server.access.caller(request)
    asked = await read_model(request, CompletionRequest, server.settings.max_body_bytes)
    exchange = Exchange(server, request.url.path, caller, asked.model, "cmpl")
    if asked.stream:
        if asked.echo and asked.logprobs is not None:
            raise invalid("echo with logprobs cannot be streamed: leave stream out", "stream")
        return await stream(_events(exchange, asked))
    return await whole(request, _document(exchange, asked))


def as_prompts(given: Any) -> list[Any]:
    """One text, one list of ids, or several of either -> several."""
    single = isinstance(given, str) or isinstance(given[0], int)
    return [given] if single else list(given)


async def _jobs(exchange: Exchange, asked: CompletionRequest, llm: LLM) -> list[Job]:
    params, constraint = completion_params(asked), constraint_of(asked)
    scored = asked.logprobs if asked.echo else None
    jobs = []
    for prompt in as_prompts(asked.prompt):
        ids = await llm.aids(prompt)
        exchange.check_prompt(len(ids))
        jobs.append(Job(ids, params, constraint, exchange.caller.name, scored))
    return jobs


async def _answer(exchange: Exchange, llm: LLM, job: Job) -> Answer:
    async with llm.reply(job) as (reply, box):
        while not reply.done:
            exchange.saw(reply.feed(await box.get()))
        return reply.answer()


async def _document(exchange: Exchange, asked: CompletionRequest) -> Json:
    async with exchange.open() as llm:
        jobs = await _jobs(exchange, asked, llm)
        async with _all_or_none([_answer(exchange, llm, job) for job in jobs]) as answers:
            choices = [
                _choice(choice, answer, asked, llm, i * (asked.n or 1))
                for i, answer in enumerate(answers)
                for choice in answer.choices
            ]
        return _head(exchange, asked) | {"choices": choices, "usage": exchange.usage()}


@contextlib.asynccontextmanager
async def _all_or_none(work: list[Any]) -> AsyncGenerator[list[Answer], None]:
    """All answers; when one fails, the others are not waited for."""
    tasks = [asyncio.ensure_future(w) for w in work]
    try:
        yield await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _head(exchange: Exchange, asked: CompletionRequest) -> Json:
    return {
        "id": exchange.id,
        "object": "text_completion",
        "created": exchange.created,
        "model": asked.model,
        "system_fingerprint": None,
    }


def _choice(choice: Choice, answer: Answer, asked: CompletionRequest, llm: LLM, first_index: int) -> Json:
    text, tokens, finish = choice.text, choice.tokens, finish_reason(choice.ending.reason)
    if asked.max_tokens == 0:  # only the prompt was wanted; the engine gives one token at least
        text, tokens, finish = "", (), "length"
    prompt = llm.tokenizer.decode(answer.prompt_ids) if asked.echo else ""
    logprobs = None
    if asked.logprobs is not None and asked.echo:
        scored = (*answer.prompt_scores, *tokens)
        logprobs = completion_logprobs(scored, llm.tokenizer, 0, answer.prompt_ids[0])
    elif asked.logprobs is not None:
        logprobs = completion_logprobs(tokens, llm.tokenizer)
    return {
        "index": first_index + choice.index,
        "text": prompt + text,
        "logprobs": logprobs,
        "finish_reason": finish,
    }


async def _events(exchange: Exchange, asked: CompletionRequest) -> AsyncGenerator[bytes, None]:
    """Several prompts take turns as their tokens come."""
    async with exchange.open() as llm:
        jobs = await _jobs(exchange, asked, llm)
        head = _opening(exchange, asked)
        try:
            if asked.echo:
                for i, job in enumerate(jobs):
                    text = llm.tokenizer.decode(llm.ids(job.prompt))
                    yield b"".join(_chunk(head, i * job.params.n + c, text) for c in range(job.params.n))
            async with contextlib.aclosing(_in_turns(llm, jobs)) as news:
                async for number, deltas in news:
                    exchange.saw(deltas)
                    if chunk := _chunks(head, asked, llm, number, deltas):
                        yield chunk
        except QuantmillError as error:
            if exchange.completion_tokens == 0 and exchange._first is None:
                raise
            exchange.error = str(error)
            yield f"data: {json.dumps(of(error).to_json())}\n\n".encode()
            return
        if asked.stream_options is not None and asked.stream_options.include_usage:
            last = _head(exchange, asked) | {"choices": [], "usage": exchange.usage()}
            yield f"data: {json.dumps(last)}\n\n".encode()
        yield DONE


async def _in_turns(llm: LLM, jobs: list[Job]) -> AsyncGenerator[tuple[int, list[Delta]], None]:
    """What is new in any of the answers, by the number of its prompt."""
    if len(jobs) == 1:
        async for deltas in llm.astream(jobs[0]):
            yield 0, deltas
        return
    queue: asyncio.Queue[tuple[int, list[Delta]] | BaseException] = asyncio.Queue()
    tasks = [asyncio.create_task(_follow(i, llm, job, queue)) for i, job in enumerate(jobs)]
    left = sum(job.params.n for job in jobs)
    try:
        while left:
            got = await queue.get()
            if isinstance(got, BaseException):
                raise got
            left -= sum(d.ending is not None for d in got[1])
            yield got
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _follow(number: int, llm: LLM, job: Job, queue: asyncio.Queue[Any]) -> None:
    try:
        async for deltas in llm.astream(job):
            queue.put_nowait((number, deltas))
    except QuantmillError as error:
        queue.put_nowait(error)


def _opening(exchange: Exchange, asked: CompletionRequest) -> str:
    """What all chunks of a stream begin with."""
    return "data: " + json.dumps(_head(exchange, asked))[:-1] + ', "choices": [{"index": '


def _chunks(head: str, asked: CompletionRequest, llm: LLM, number: int, deltas: list[Delta]) -> bytes:
    made = []
    for d in deltas:
        if asked.max_tokens == 0:
            d = replace(d, text="", tokens=())
        if not (d.text or d.ending or (asked.logprobs is not None and d.tokens)):
            continue
        finish = finish_reason(d.ending.reason) if d.ending is not None else None
        logprobs = None
        if asked.logprobs is not None and d.tokens:
            logprobs = completion_logprobs(d.tokens, llm.tokenizer)
        made.append(_chunk(head, number * (asked.n or 1) + d.choice, d.text, logprobs, finish))
    return b"".join(made)


def _chunk(
    head: str, index: int, text: str, logprobs: Json | None = None, finish: str | None = None
) -> bytes:
    said = "null" if logprobs is None else json.dumps(logprobs)
    ended = "null" if finish is None else f'"{finish}"'
    rest = f', "text": {json.dumps(text)}, "logprobs": {said}, "finish_reason": {ended}}}]}}\n\n'
    return (head + str(index) + rest).encode()
