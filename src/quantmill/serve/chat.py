"""POST /v1/chat/completions."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator

from starlette.requests import Request
from starlette.responses import Response

from quantmill.errors import QuantmillError
from quantmill.runtime.engine_types import Reason
from quantmill.runtime.llm import LLM, Job
from quantmill.runtime.llm_text import Choice, Delta
from quantmill.serve.body import read_model
from quantmill.serve.conversation import prompt_ids
from quantmill.serve.exchange import Exchange, server_of
from quantmill.serve.logprobs import chat_logprobs
from quantmill.serve.params import chat_params, constraint_of
from quantmill.serve.refusal import invalid, of
from quantmill.serve.schemas import ChatRequest
from quantmill.serve.sse import DONE, stream, whole
from quantmill.serve.tools import ToolSplitter, ToolUse, tool_use
from quantmill.types import Json


async def chat_completions(request: Request) -> Response:
    server = server_of(request)
    caller = server.access.caller(request)
    asked = await read_model(request, ChatRequest, server.settings.max_body_bytes)
    exchange = Exchange(server, request.url.path, caller, asked.model, "chatcmpl")
    if asked.stream:
        return await stream(_events(exchange, asked))
    return await whole(request, _document(exchange, asked))


async def _job(exchange: Exchange, asked: ChatRequest, llm: LLM, tools: ToolUse | None) -> Job:
    """Raises Refusal."""
    constraint = constraint_of(asked)
    if tools is not None and tools.constraint is not None:
        if constraint is not None:
            raise invalid("response_format and a tool_choice that must be called exclude each other")
        constraint = tools.constraint
    ids = await prompt_ids(asked, llm.tokenizer, tools)
    exchange.check_prompt(len(ids))
    return Job(ids, chat_params(asked), constraint, exchange.caller.name)


async def _document(exchange: Exchange, asked: ChatRequest) -> Json:
    async with exchange.open() as llm:
        tools = tool_use(asked, llm.tokenizer)
        async with llm.reply(await _job(exchange, asked, llm, tools)) as (reply, box):
            while not reply.done:
                exchange.saw(reply.feed(await box.get()))
        choices = [_choice(c, asked, llm, tools) for c in reply.answer().choices]
        return {
            "id": exchange.id,
            "object": "chat.completion",
            "created": exchange.created,
            "model": asked.model,
            "choices": choices,
            "usage": exchange.usage(),
            "system_fingerprint": None,
        }


def _choice(choice: Choice, asked: ChatRequest, llm: LLM, tools: ToolUse | None) -> Json:
    content: str | None = choice.text
    message: Json = {"role": "assistant", "refusal": None}
    finish = finish_reason(choice.ending.reason)
    if tools is not None:
        splitter = ToolSplitter(tools, llm.tokenizer)
        text = splitter.push(choice.text, choice.token_ids) + splitter.finish()
        if splitter.calls:
            message["tool_calls"] = [c.to_json() for c in splitter.calls]
            content, finish = text or None, "tool_calls"
    logprobs = chat_logprobs(choice.tokens, llm.tokenizer) if asked.logprobs else None
    return {
        "index": choice.index,
        "message": message | {"content": content},
        "logprobs": logprobs,
        "finish_reason": finish,
    }


async def _events(exchange: Exchange, asked: ChatRequest) -> AsyncGenerator[bytes, None]:
    async with exchange.open() as llm:
        tools = tool_use(asked, llm.tokenizer)
        writer = _Writer(exchange, asked, llm, tools)
        async with llm.reply(await _job(exchange, asked, llm, tools)) as (reply, box):
            yield writer.roles()
            try:
                while not reply.done:
                    deltas = reply.feed(await box.get())
                    exchange.saw(deltas)
                    if chunk := writer.deltas(deltas):
                        yield chunk
            except QuantmillError as error:  # too late for a status
                exchange.error = str(error)
                yield _event(of(error).to_json())
                return
        yield writer.end()


class _Writer:
    """Chunks of one stream. What is the same in all of them is written once."""

    def __init__(self, exchange: Exchange, asked: ChatRequest, llm: LLM, tools: ToolUse | None) -> None:
        self.exchange, self.llm, self.logprobs = exchange, llm, bool(asked.logprobs)
        self.count = asked.n or 1
        self.usage = asked.stream_options is not None and asked.stream_options.include_usage
        self.splitters = [ToolSplitter(tools, llm.tokenizer) for _ in range(self.count)] if tools else None
        head = {
            "id": exchange.id,
            "object": "chat.completion.chunk",
            "created": exchange.created,
            "model": asked.model,
            "system_fingerprint": None,
        }
        if self.usage:
            head["usage"] = None
        self._head = "data: " + json.dumps(head)[:-1] + ', "choices": [{"index": '

    def roles(self) -> bytes:
        delta = {"role": "assistant", "content": "", "refusal": None}
        return b"".join(self._chunk(i, json.dumps(delta)) for i in range(self.count))

    def deltas(self, deltas: list[Delta]) -> bytes:
        return b"".join(self._delta(d) for d in deltas)

    def _delta(self, delta: Delta) -> bytes:
        if self.splitters is not None:
            return self._split(delta, self.splitters[delta.choice])
        made = b""
        if delta.text or (self.logprobs and delta.tokens):
            made = self._chunk(
                delta.choice, f'{{"content": {json.dumps(delta.text)}}}', self._logprobs(delta)
            )
        if delta.ending is not None:
            made += self._chunk(delta.choice, "{}", finish=finish_reason(delta.ending.reason))
        return made

    def _split(self, delta: Delta, splitter: ToolSplitter) -> bytes:
        text = splitter.push(delta.text, [s.token for s in delta.tokens])
        made = b""
        if delta.ending is not None:
            text += splitter.finish()
        if text or (self.logprobs and delta.tokens):
            made = self._chunk(delta.choice, f'{{"content": {json.dumps(text)}}}', self._logprobs(delta))
        if delta.ending is None:
            return made
        for i, call in enumerate(splitter.calls):
            listed = {"tool_calls": [{"index": i, **call.to_json()}]}
            made += self._chunk(delta.choice, json.dumps(listed))
        finish = "tool_calls" if splitter.calls else finish_reason(delta.ending.reason)
        return made + self._chunk(delta.choice, "{}", finish=finish)

    def _logprobs(self, delta: Delta) -> str:
        if not (self.logprobs and delta.tokens):
            return "null"
        return json.dumps(chat_logprobs(delta.tokens, self.llm.tokenizer))

    def _chunk(self, index: int, delta: str, logprobs: str = "null", finish: str | None = None) -> bytes:
        end = f'"{finish}"' if finish else "null"
        rest = f'{index}, "delta": {delta}, "logprobs": {logprobs}, "finish_reason": {end}}}]}}\n\n'
        return (self._head + rest).encode()

    def end(self) -> bytes:
        if not self.usage:
            return DONE
        head = json.loads(self._head.removeprefix("data: ") + "0}]}")
        return _event({**head, "choices": [], "usage": self.exchange.usage()}) + DONE


def finish_reason(reason: Reason) -> str:
    """OpenAI knows no abort: an answer that the server had to end was cut."""
    return "stop" if reason is Reason.STOP else "length"


def _event(data: Json) -> bytes:
    return f"data: {json.dumps(data)}\n\n".encode()
