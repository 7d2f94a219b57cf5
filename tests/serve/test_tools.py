"""Reading calls out of what models say, whole and in pieces."""

from __future__ import annotations

import json

import pytest

from quantmill.runtime.constraints import Constraint, ConstraintCompiler
from quantmill.runtime.tokenizer import TextTokenizer
from quantmill.serve.params import closed, schema_constraint
from quantmill.serve.refusal import Refusal
from quantmill.serve.schemas import ChatRequest
from quantmill.serve.tools import ToolSplitter, ToolUse, read_calls, tool_use, tools_as_text
from toy_llm import toy_tokenizer

CALL = '{"name": "f", "arguments": {"x": "a}b"}}'
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def calls(text: str) -> list[tuple[str, object]]:
    return [(c.name, json.loads(c.arguments)) for c in read_calls(text)]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (f"{CALL}</tool_call>", [("f", {"x": "a}b"})]),
        (f"\n{CALL}\n</tool_call>\n<tool_call>{CALL}</tool_call>", [("f", {"x": "a}b"})] * 2),
        (f" [{CALL}, {CALL}]", [("f", {"x": "a}b"})] * 2),
        ('{"name": "f", "parameters": {"y": 1}}', [("f", {"y": 1})]),
        ('f{"x": 1}', [("f", {"x": 1})]),
        ('f[ARGS]{"x": 1}', [("f", {"x": 1})]),
        ('{"name": "f"}', [("f", {})]),
        ('{"name": "f", "arguments": "{\\"x\\": 1}"}', [("f", {"x": 1})]),
        ("nothing here", []),
        ('{"name": 5}', []),
        ("{broken", []),
        ("[" * 3000, []),
        ("", []),
    ],
)
def test_calls_are_read(text: str, wanted: list[tuple[str, object]]) -> None:
    assert calls(text) == wanted


def split(style: str, text: str, size: int, parallel: bool = True) -> tuple[str, int]:
    splitter = ToolSplitter(ToolUse((), style, True, parallel), toy_tokenizer())
    shown = "".join(splitter.push(text[i : i + size]) for i in range(0, len(text), size))
    return shown + splitter.finish(), len(splitter.calls)


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_text_is_shown_and_calls_are_not(size: int) -> None:
    hermes = f"I call.<tool_call>{CALL}</tool_call><tool_call>{CALL}</tool_call>"
    assert split("hermes", hermes, size) == ("I call.", 2)
    assert split("hermes", hermes, size, parallel=False) == ("I call.", 1)
    assert split("hermes", "a <tool and <tool_call", size) == ("a <tool and <tool_call", 0)
    assert split("hermes", "see <tool_call> broken", size) == ("see <tool_call> broken", 0)
    assert split("mistral", f"ok[TOOL_CALLS] [{CALL}]", size) == ("ok", 1)
    assert split("json", f"  {CALL}", size) == ("", 1)
    assert split("json", "  plain text {", size) == ("  plain text {", 0)
    assert split("json", '{"answer": 5}', size) == ('{"answer": 5}', 0)


def test_a_mark_that_is_a_token_without_text() -> None:
    from tokenizers import AddedToken

    tokenizer = TextTokenizer.from_transformers(__import__("tiny_models").byte_level_tokenizer())
    tokenizer.backend.add_special_tokens([AddedToken("[TOOL_CALLS]", special=True)])
    mark = tokenizer.backend.token_to_id("[TOOL_CALLS]")
    splitter = ToolSplitter(ToolUse((), "mistral", True, True), tokenizer)
    assert splitter.push("hm", [5]) == "hm"
    assert splitter.push("", [mark]) == ""
    assert splitter.push(f"[{CALL}]", [6, 7]) == ""
    assert splitter.finish() == ""
    assert len(splitter.calls) == 1


@pytest.mark.parametrize(
    ("template", "style", "shown"),
    [
        ("{% for m in messages %}{% endfor %}", "hermes", False),
        ("{{ tools }} <tool_call>", "hermes", True),
        ("{{ tools }} [TOOL_CALLS]", "mistral", True),
        ("{{ tools }}", "json", True),
    ],
)
def test_the_template_says_how_calls_look(template: str, style: str, shown: bool) -> None:
    tokenizer = TextTokenizer(toy_tokenizer().backend, {}, {"default": template})
    request = ChatRequest(model="m", messages=[{"role": "user", "content": "x"}], tools=[TOOL])
    use = tool_use(request, tokenizer)
    assert use is not None
    assert (use.style, use.shown, use.constraint) == (style, shown, None)
    assert tool_use(request.model_copy(update={"tool_choice": "none"}), tokenizer) is None
    must = tool_use(request.model_copy(update={"tool_choice": "required"}), tokenizer)
    assert must is not None
    assert must.style == "json"
    assert must.constraint is not None
    assert '"f"' in tools_as_text(use.tools)


def test_a_call_of_nothing_is_refused() -> None:
    request = ChatRequest(model="m", messages=[{"role": "user", "content": "x"}], tool_choice="required")
    with pytest.raises(Refusal, match="there are no tools"):
        tool_use(request, toy_tokenizer())


def follows(constraint: Constraint, text: str) -> bool:
    """Whether a constrained answer could be this text."""
    tokenizer = toy_tokenizer()
    compiler = ConstraintCompiler(tokenizer, tokenizer.vocab_size, tokenizer.eos_token_ids)
    matcher = compiler.compile(constraint)()
    for token in tokenizer.encode(text, special=False):
        if not matcher.mask()[token]:
            return False
        matcher.accept(token)
    return True


@pytest.mark.parametrize("names", [["f"], ["f", "g"]])
def test_a_tool_whose_schema_refers_to_its_own_parts(names: list[str]) -> None:
    place = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    schema = {"type": "object", "properties": {"at": {"$ref": "#/$defs/Place"}}, "required": ["at"]}
    tools = [
        {"type": "function", "function": {"name": n, "parameters": {**schema, "$defs": {"Place": place}}}}
        for n in names
    ]
    said = [{"role": "user", "content": "x"}]
    request = ChatRequest.model_validate(
        {"model": "m", "messages": said, "tools": tools, "tool_choice": "required"}
    )
    use = tool_use(request, toy_tokenizer())
    assert use is not None
    assert use.constraint is not None
    assert follows(use.constraint, '{"name": "f", "arguments": {"at": {"city": "Rome"}}}')
    assert not follows(use.constraint, '{"name": "f", "arguments": {"at": {"town": "Rome"}}}')
    assert not follows(use.constraint, '{"name": "f", "arguments": {"at": {"city": "Rome", "x": 1}}}')


def test_objects_hold_what_they_list_unless_they_say_otherwise() -> None:
    inner = {"type": "object", "properties": {"x": {"type": "integer"}}}
    schema = {"type": "object", "properties": {"a": inner, "b": {"type": "array", "items": inner}}}
    assert follows(schema_constraint(schema), '{"a": {"x": 1}, "b": [{"x": 2}]}')
    assert not follows(schema_constraint(schema), '{"a": {"x": 1, "y": 2}}')
    assert not follows(schema_constraint(schema), '{"c": 1}')
    assert follows(schema_constraint({**schema, "additionalProperties": True}), '{"c": 1}')
    both = {"properties": {"a": {"type": "integer"}}, "allOf": [{"properties": {"b": {"type": "integer"}}}]}
    assert closed(both) == both
    either = {"anyOf": [inner, {"type": "null"}]}
    assert closed(either)["anyOf"][0]["additionalProperties"] is False
