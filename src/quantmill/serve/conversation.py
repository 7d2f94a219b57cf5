"""Messages of a request -> the prompt's token ids, through the model's own template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from quantmill.errors import BadRequest
from quantmill.runtime.tokenizer import Message, TextTokenizer
from quantmill.serve.refusal import invalid
from quantmill.serve.schemas import ChatMessage, ChatRequest, TokenizeRequest
from quantmill.serve.tools import ToolUse, tools_as_text
from quantmill.types import Json


async def prompt_ids(request: ChatRequest, tokenizer: TextTokenizer, tools: ToolUse | None) -> list[int]:
    """Raises Refusal, BadRequest where the template refuses the messages."""
    if not tokenizer.has_template:
        raise invalid(f"{request.model} has no chat template: send texts to /v1/completions instead", "model")
    messages: list[Message] = [as_message(m, tools) for m in request.messages]
    if tools is not None and not tools.shown:
        messages = [{"role": "system", "content": tools_as_text(tools.tools)}, *messages]
    template = request.chat_template
    if template is not None and template not in tokenizer.templates:
        raise invalid(f"chat_template is none of {', '.join(tokenizer.templates)}", "chat_template")
    listed = list(tools.tools) if tools is not None and tools.shown else None
    continued = bool(request.continue_final_message)
    return await conversation_ids(messages, tokenizer, listed, template, continued)


async def conversation_ids(
    messages: list[Message],
    tokenizer: TextTokenizer,
    tools: list[Json] | None = None,
    template: str | None = None,
    continue_last: bool = False,
) -> list[int]:
    """Messages as templates know them -> token ids. Raises BadRequest where the template refuses them."""
    text = conversation_text(messages, tokenizer, tools, template, continue_last)
    return await tokenizer.aencode(text, special=False)


def conversation_text(
    messages: list[Message],
    tokenizer: TextTokenizer,
    tools: list[Json] | None = None,
    template: str | None = None,
    continue_last: bool = False,
) -> str:
    """The same as text. `continue_last`: the last message is the beginning of the answer, which goes on."""
    messages = _one_system(messages)
    if not continue_last:
        return _text(messages, tokenizer, tools, template)
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise BadRequest("only an assistant's message can be continued, and the last is not: send one")
    return _text(messages[:-1], tokenizer, tools, template) + str(messages[-1]["content"])


async def tokenize_ids(request: TokenizeRequest, tokenizer: TextTokenizer) -> list[int]:
    """Raises Refusal where there is not exactly one of prompt and messages."""
    if (request.prompt is None) == (request.messages is None):
        raise invalid("give prompt or messages, one of them", "prompt")
    if request.prompt is not None:
        return await tokenizer.aencode(request.prompt, special=request.add_special_tokens)
    return await conversation_ids([as_message(m, None) for m in request.messages or ()], tokenizer)


def as_message(message: ChatMessage, tools: ToolUse | None) -> Json:
    """A message as templates know it: text, and arguments of calls as objects."""
    content = message.content
    text = "".join(p.text for p in content) if isinstance(content, list) else content or ""
    role = "system" if message.role == "developer" else message.role
    made: Json = {"role": role, "content": text}
    if message.role == "tool":
        made |= {"tool_call_id": message.tool_call_id, "name": message.name}
    calls = [
        {"name": c.function.name, "arguments": _object(c.function.arguments)}
        for c in message.tool_calls or ()
    ]
    if tools is not None and tools.shown:
        ids = [c.id for c in message.tool_calls or ()]
        if calls:
            made["tool_calls"] = [
                {"id": i, "type": "function", "function": c} for i, c in zip(ids, calls, strict=True)
            ]
        return made
    # A template that knows no tools sees calls and results as text.
    if calls:
        made["content"] += "".join(
            f"<tool_call>{json.dumps(c, ensure_ascii=False)}</tool_call>" for c in calls
        )
    if role == "tool":
        made = {"role": "user", "content": f"<tool_response>{text}</tool_response>"}
    return made


def _object(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments


def _one_system(messages: list[Message]) -> list[Message]:
    """System texts at the beginning as one: templates know no second."""
    count = next((i for i, m in enumerate(messages) if m["role"] != "system"), len(messages))
    if count < 2:
        return messages
    text = "\n\n".join(m["content"] for m in messages[:count])
    return [{"role": "system", "content": text}, *messages[count:]]


def _text(
    messages: Sequence[Message], tokenizer: TextTokenizer, tools: list[Json] | None, template: str | None
) -> str:
    """The prompt. A template that refuses system text gets it at the head of the first question."""
    try:
        return tokenizer.chat_text(messages, tools=tools, template=template)
    except BadRequest:
        if not tokenizer.has_template or len(messages) < 2 or messages[0]["role"] != "system":
            raise
    first = messages[1]
    merged = {**first, "content": f"{messages[0]['content']}\n\n{first['content']}"}
    return tokenizer.chat_text([merged, *messages[2:]], tools=tools, template=template)
