"""Chat templates: messages -> the prompt's text, in a sandbox. Knows no tokens and no files.

What templates may rely on (filters, functions, whitespace rules, the `generation` tag) is what Transformers
gives them; they come from strangers, so they see plain data and nothing of this process.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from quantmill.errors import BadRequest

if TYPE_CHECKING:
    from jinja2 import Template

Message = Mapping[str, Any]  # {"role": "system" | "user" | "assistant" | "tool", "content": text, ...}

# What a template can raise when messages do not fit it, besides Jinja's own errors.
_TROUBLE = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)


def render(
    template: str,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None,
    answer: bool,
    special: Mapping[str, str],
) -> str:
    """The text of a conversation; with `answer`, up to where the assistant's next message begins.

    `special`: bos_token and so on, which templates write themselves. Raises BadRequest where the template
    refuses the messages or is no template.
    """
    from jinja2 import TemplateError

    # An absent key is what templates test for; None would be written as "None".
    told = [{key: value for key, value in m.items() if value is not None} for m in messages]
    listed = None if tools is None else [dict(tool) for tool in tools]
    try:
        made = _compiled(template)
        return str(made.render(messages=told, tools=listed, add_generation_prompt=answer, **special))
    except (TemplateError, *_TROUBLE) as error:
        roles = ", ".join(str(m.get("role")) for m in messages)
        raise BadRequest(
            f"the chat template refuses the roles {roles} ({error}): leave out the system text"
        ) from error


@lru_cache(maxsize=16)
def _compiled(template: str) -> Template:
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The tag around what an assistant said: marks it for training, changes no text."""

        tags = {"generation"}  # noqa: RUF012  # Jinja's own interface

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter would escape it for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
