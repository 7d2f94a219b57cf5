"""The prompt template of a model folder as a person reads it: the tokenizer's chat template, rendered once.

Reads tokenizer files, loads no tokenizer. Rendering is Transformers' (a sandbox), so that the card shows what
`apply_chat_template` gives.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantmill.files import read_json
from quantmill.types import Json

PROMPT, ANSWER, NEXT = "{prompt}", "{answer}", "{next prompt}"


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """`{prompt}` stands for the user's text; `turns` is a second question after the first one's answer."""

    text: str
    turns: str | None


def read_prompt(folder: Path) -> PromptTemplate | None:
    """The template of a folder; None where there is none, or where it does not render from a prompt alone."""
    template = chat_template(folder)
    if template is None:
        return None
    tokens = special_tokens(folder)
    text = _render(template, tokens, PROMPT)
    if text is None or PROMPT not in text:
        return None
    return PromptTemplate(text, _render(template, tokens, PROMPT, ANSWER, NEXT))


def chat_template(folder: Path) -> str | None:
    """The Jinja source, wherever it is kept: in its own file, in a JSON file, in the tokenizer's config."""
    own = folder / "chat_template.jinja"
    if own.is_file():
        return own.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        stored = read_json(folder / name).get("chat_template") if (folder / name).is_file() else None
        if isinstance(stored, list):  # several, by name
            named = {entry.get("name"): entry.get("template") for entry in stored if isinstance(entry, dict)}
            stored = named.get("default")
        if isinstance(stored, str) and stored:
            return stored
    return None


def special_tokens(folder: Path) -> dict[str, str]:
    """`bos_token`, `eos_token`, ... as text; the tokenizer's config wins over special_tokens_map.json."""
    tokens: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        stored: Json = read_json(folder / name) if (folder / name).is_file() else {}
        for key, value in stored.items():
            content = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(content, str):
                tokens[key] = content
    return tokens


def _render(template: str, tokens: dict[str, str], *turns: str) -> str | None:
    """A chat of turns, user first, up to where the model writes; None where the template refuses."""
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    roles = ("user", "assistant")
    chat = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
    variables: dict[str, Any] = {"add_generation_prompt": True, **tokens}
    try:
        rendered: Any = render_jinja_template([chat], chat_template=template, **variables)
    except (jinja2.TemplateError, TypeError, ValueError):  # all that a template of others can do wrong
        return None
    return str(rendered[0][0])  # (conversations, spans of answers)
