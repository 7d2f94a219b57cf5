"""Functions that a model may call: how they are shown to it, and how its calls are read from what it says.

Models write calls in the way of their template:

    hermes   <tool_call>{"name": ..., "arguments": {...}}</tool_call>, as often as there are calls
    mistral  [TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...], or name{...} and name[ARGS]{...}
    json     the whole answer is one such object, or a list of them ("parameters" for "arguments" too)

A template that knows no tools gets them as system text, in the way of hermes.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quantmill.runtime.constraints import Constraint, ConstraintKind
from quantmill.runtime.llm_text import overlap
from quantmill.runtime.tokenizer import TextTokenizer
from quantmill.serve.params import closed
from quantmill.serve.refusal import invalid
from quantmill.serve.schemas import ChatRequest, NamedTool, Tool
from quantmill.types import Json

MARKS: dict[str, str | None] = {"hermes": "<tool_call>", "mistral": "[TOOL_CALLS]", "json": None}
MOST_FAILURES = 32  # brackets that begin nothing, after which a text is no longer searched for calls
_NAMED_ARGUMENTS = re.compile(r"\s*([\w.-]+)\s*(?:\[ARGS\])?\s*(?=\{)")


@dataclass(frozen=True, slots=True)
class Call:
    """A function call of the model."""

    name: str
    arguments: str  # JSON
    id: str

    def to_json(self) -> Json:
        return {
            "id": self.id,
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        }


@dataclass(frozen=True, slots=True)
class ToolUse:
    """How one request uses tools."""

    tools: tuple[Json, ...]  # as the template gets them
    style: str  # a row of MARKS
    shown: bool  # the template shows them itself
    parallel: bool
    constraint: Constraint | None = None  # a call must be made


def tool_use(request: ChatRequest, tokenizer: TextTokenizer) -> ToolUse | None:
    """None where no tool may be called. Raises Refusal."""
    tools, choice = request.tools or [], request.tool_choice or "auto"
    if not tools and choice not in ("none", "auto"):
        raise invalid("tool_choice asks for a call and there are no tools", "tool_choice")
    if not tools or choice == "none":
        return None
    template = tokenizer.templates.get("tool_use") or next(iter(tokenizer.templates.values()), "")
    shown, style = "tools" in template, "hermes"
    if shown and "[TOOL_CALLS]" in template:
        style = "mistral"
    elif shown and "<tool_call>" not in template:
        style = "json"
    constraint = None if choice == "auto" else _must_call(tools, choice)
    style = "json" if constraint is not None else style
    listed = tuple(t.model_dump(exclude_none=True) for t in tools)
    return ToolUse(listed, style, shown, request.parallel_tool_calls is not False, constraint)


def _must_call(tools: list[Tool], choice: str | NamedTool) -> Constraint:
    """A call of one of the tools, or of the named one, with arguments after its schema."""
    wanted = tools
    if isinstance(choice, NamedTool):
        wanted = [t for t in tools if t.function.name == choice.function.name]
        if not wanted:
            raise invalid(f"tool_choice names {choice.function.name!r}, which is no tool", "tool_choice")
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": t.function.name},
                "arguments": _arguments(t, f"#/anyOf/{i}" if len(wanted) > 1 else "#"),
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for i, t in enumerate(wanted)
    ]
    schema = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(schema))


def _arguments(tool: Tool, place: str) -> Json:
    """The schema of a tool's arguments, for where it stands in the whole: its references go along."""
    found: Json = _moved(
        closed(tool.function.parameters or {"type": "object"}), f"{place}/properties/arguments"
    )
    return found


def _moved(schema: Any, place: str) -> Any:
    """A schema whose root is at `place` of another one."""
    if isinstance(schema, list):
        return [_moved(part, place) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _moved(value, place) for key, value in schema.items()}
    reference = made.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        made["$ref"] = place + reference[1:]
    return made


def tools_as_text(tools: Sequence[Json]) -> str:
    """System text for a template that knows no tools."""
    listed = "\n".join(json.dumps(t["function"], ensure_ascii=False) for t in tools)
    return (
        f"You may call these functions:\n{listed}\n"
        "To call one, write its name and its arguments as JSON between tags, and nothing else:\n"
        '<tool_call>{"name": "function name", "arguments": {"argument": "value"}}</tool_call>'
    )


class ToolSplitter:
    """What a model says, as it comes -> text to show, and calls at the end."""

    def __init__(self, use: ToolUse, tokenizer: TextTokenizer) -> None:
        self.parallel, self._style = use.parallel, use.style
        self._mark, self._tokenizer = MARKS[use.style], tokenizer
        self._mark_id = tokenizer.backend.token_to_id(self._mark) if self._mark else None
        self._text, self._shown = "", 0
        self._at: int | None = None  # where calls begin
        self.calls: list[Call] = []

    def push(self, text: str, tokens: Sequence[int] = ()) -> str:
        """What can be shown now. `tokens`: those that `text` comes from; a mark may have no text of its own."""
        before, self._text = len(self._text), self._text + text
        if self._at is None:
            self._at = self._find(before, tokens)
        return self._show(self._at if self._at is not None else len(self._text) - self._held())

    def finish(self) -> str:
        """Read the calls -> text that was held back and is none."""
        if self._at is not None:
            found = read_calls(self._text[self._at :].removeprefix(self._mark or ""))
            self.calls = found if self.parallel else found[:1]
            if found:
                return ""
        return self._show(len(self._text))

    def _show(self, end: int) -> str:
        shown, self._shown = self._text[self._shown : end], max(self._shown, end)
        return shown

    def _find(self, before: int, tokens: Sequence[int]) -> int | None:
        if self._mark is None:
            return 0 if self._text.lstrip()[:1] in ("{", "[") and self._text.strip() else None
        at = self._text.find(self._mark, self._shown)
        if at < 0 and self._mark_id is not None and self._mark_id in tokens:
            said = self._tokenizer.decode(tokens[: list(tokens).index(self._mark_id)])
            at = min(before + len(said), len(self._text))
        return at if at >= 0 else None

    def _held(self) -> int:
        """Characters at the end that may be the beginning of a mark."""
        if self._mark is None:
            return 0 if self._text.strip() else len(self._text)
        return overlap(self._text, self._mark)


def read_calls(said: str) -> list[Call]:
    """Every call in a text: JSON objects and lists with a name, or a name before an object of arguments."""
    calls: list[Call] = []
    decoder, at, failed = json.JSONDecoder(), 0, 0
    while at < len(said) and failed < MOST_FAILURES:
        named = _NAMED_ARGUMENTS.match(said, at)
        begin = (
            named.end() if named else next((i for i in range(at, len(said)) if said[i] in "{["), len(said))
        )
        try:
            value, end = decoder.raw_decode(said, begin)
        except (ValueError, RecursionError):
            at, failed = begin + 1, failed + 1
            continue
        if named and isinstance(value, dict):
            calls.append(_call(named[1], value))
        else:
            calls += [c for v in (value if isinstance(value, list) else [value]) if (c := _object_call(v))]
        at = end
    return calls


def _object_call(value: Any) -> Call | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    return _call(value["name"], arguments)


def _call(name: str, arguments: Any) -> Call:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return Call(name, text, f"call_{uuid.uuid4().hex[:24]}")
