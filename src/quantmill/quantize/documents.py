"""Turns a row of a data set into a document: a plain text or a chat. Knows no files, no hub and no tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from quantmill.errors import BadText

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a chat."""

    role: str
    content: str


Chat = tuple[Turn, ...]
Document = str | Chat

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def from_rows(rows: Iterator[Row], name: str, *, keep_empty: bool = False) -> Iterator[Document | None]:
    """The first row must have a known column, or the whole source is refused; later misfits become None."""
    for number, row in enumerate(rows):
        if number == 0 and not any(set(keys) <= set(row) for keys, _ in COLUMNS):
            known = ", ".join("+".join(keys) for keys, _ in COLUMNS)
            raise BadText(f"{name} has the columns {', '.join(map(str, row))}: rename one to {known}")
        yield "" if keep_empty and row.get("text") == "" else _document(row)


def _document(row: Row) -> Document | None:
    """The first column that holds something usable, in the order of COLUMNS."""
    found = (read(*(row[key] for key in keys)) for keys, read in COLUMNS if set(keys) <= set(row))
    return next((document for document in found if document is not None), None)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value.strip() and _is_unicode(value) else None


def _is_unicode(text: str) -> bool:
    """JSON can spell half a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _chat(value: object) -> Chat | None:
    """A list of {role, content} or {from, value}; None when a message is anything else."""
    turns = [_turn(message) for message in value] if isinstance(value, list) else []
    usable = tuple(turn for turn in turns if turn is not None)
    return usable if usable and len(usable) == len(turns) else None


def _turn(message: object) -> Turn | None:
    if not isinstance(message, dict):
        return None
    sender = message.get("role") or message.get("from")
    content = _text(message.get("content") or message.get("value"))
    return Turn(ROLES.get(sender, sender), content) if isinstance(sender, str) and content else None


def _exchange(prompt: object, response: object) -> Chat | None:
    question, answer = _text(prompt), _text(response)
    return (Turn("user", question), Turn("assistant", answer)) if question and answer else None


COLUMNS: tuple[tuple[tuple[str, ...], Callable[..., Document | None]], ...] = (
    (("text",), _text),
    (("content",), _text),
    (("messages",), _chat),
    (("conversations",), _chat),
    (("prompt", "response"), _exchange),
    (("prompt", "completion"), _exchange),
)
