"""From a request to the function that answers it. Knows no repositories.

Paths are split while still quoted, then each part is unquoted once: a branch may hold a slash (%2F), and `%2e%2e`
reaches the rules of names.py as what it is. A pattern has words, `{one}` part, and at its end `{rest*}`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any
from urllib.parse import parse_qsl, unquote_to_bytes

from quantmill.hub.server.accounts import Account
from quantmill.hub.server.answers import Answer
from quantmill.hub.server.refusal import Refusal, bad
from quantmill.hub.server.store import Store

LONGEST_JSON = 8_000_000  # bytes
LONGEST_BODY = 1 << 30


@dataclass(frozen=True, slots=True)
class Call:
    """One request, understood."""

    store: Store
    account: Account
    parts: dict[str, str]  # what the pattern's places stand for
    query: dict[str, str]
    headers: dict[str, str]  # names in small letters
    body: IO[bytes]
    base: str  # scheme://host:port, as the client knows us

    @property
    def name(self) -> str:
        return f"{self.parts['owner']}/{self.parts['name'].removesuffix('.git')}"

    def json(self) -> dict[str, Any]:
        """The body as a JSON object. Raises Refusal (400)."""
        try:
            value = json.loads(self.body.read(LONGEST_JSON) or b"{}")
        except (ValueError, RecursionError):
            raise bad("the body is no JSON") from None
        if not isinstance(value, dict):
            raise bad("the body is no JSON object")
        return value

    def form(self) -> list[tuple[str, str]]:
        """The body as a form, or as JSON with the same keys."""
        if "json" in self.headers.get("content-type", ""):
            values = self.json().items()
            return [(k, str(x)) for k, v in values for x in (v if isinstance(v, list) else [v])]
        return parse_qsl(self.body.read(LONGEST_JSON).decode(errors="replace"), keep_blank_values=True)


Handler = Callable[[Call], Answer]


@dataclass(frozen=True, slots=True)
class Route:
    """A row: `GET /api/models/{owner}/{name}` -> handler."""

    method: str
    pattern: tuple[str, ...]
    handler: Handler
    longest: int = LONGEST_BODY  # bytes of a request
    sealed: bool = False  # the handler itself looks whose deed this is: no account's token is sent

    def match(self, method: str, parts: list[str]) -> dict[str, str] | None:
        """What the places stand for, None where the request is another."""
        tail = bool(self.pattern) and self.pattern[-1].endswith("*}")
        fixed = self.pattern[:-1] if tail else self.pattern
        if method != self.method or len(parts) < len(fixed) or (len(parts) > len(fixed) and not tail):
            return None
        found = {}
        for place, part in zip(fixed, parts, strict=False):
            if place.startswith("{"):
                found[place[1:-1]] = part
            elif place != part:
                return None
        if tail:
            found[self.pattern[-1][1:-2]] = "/".join(parts[len(fixed) :])
        return found


def route(line: str, handler: Handler, longest: int = LONGEST_BODY, *, sealed: bool = False) -> Route:
    """A row from one line of text."""
    method, path = line.split(" ")
    return Route(method, tuple(p for p in path.split("/") if p), handler, longest, sealed)


def split_path(raw: bytes) -> list[str]:
    """The parts of a path as sent, each unquoted once. Raises Refusal (400) for what is no UTF-8."""
    try:
        return [unquote_to_bytes(part).decode() for part in raw.partition(b"?")[0].split(b"/")[1:] if part]
    except UnicodeDecodeError:
        raise bad("the path is no UTF-8") from None


def find(routes: tuple[Route, ...], method: str, parts: list[str]) -> tuple[Route, dict[str, str]]:
    """The first row that fits. Raises Refusal: 404, or 405 where another method would do."""
    for row in routes:
        found = row.match("GET" if method == "HEAD" else method, parts)
        if found is not None:
            return row, found
    if any(row.match(row.method, parts) is not None for row in routes):
        raise Refusal(405, f"{method} is not for this path")
    raise Refusal(404, "there is nothing at this path", "EntryNotFound")
