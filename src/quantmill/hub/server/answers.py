"""What a handler hands back: a status, headers, and a body of known length. http.py sends it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO


@dataclass(frozen=True, slots=True)
class FilePart:
    """`count` bytes of a file from `begin` on; the sender closes it."""

    stream: BinaryIO
    begin: int
    count: int


@dataclass(frozen=True, slots=True)
class Pieces:
    """`count` bytes, one piece after the other."""

    pieces: Iterator[bytes]
    count: int


@dataclass(slots=True)
class Answer:
    """An HTTP answer. `headers` lack Content-Length, which follows from the body."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | FilePart | Pieces = b""

    @property
    def length(self) -> int:
        """Bytes of the body."""
        return len(self.body) if isinstance(self.body, bytes) else self.body.count

    def close(self) -> None:
        """Free what the body holds, when it is not sent."""
        if isinstance(self.body, FilePart):
            self.body.stream.close()
        elif isinstance(self.body, Pieces):
            close = getattr(self.body.pieces, "close", None)
            if close is not None:
                close()


def as_json(
    value: Any, status: int = 200, headers: Mapping[str, str] | None = None, kind: str = "application/json"
) -> Answer:
    """A JSON document."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return Answer(status, {"Content-Type": kind, **(headers or {})}, text.encode(errors="replace"))


def as_html(text: str) -> Answer:
    """A page."""
    return Answer(headers={"Content-Type": "text/html; charset=utf-8"}, body=text.encode())
