"""Who may come in, from where, and how many at once."""

from __future__ import annotations

import hashlib
import hmac
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from starlette.requests import Request

from quantmill.serve.refusal import Refusal
from quantmill.serve.settings import ServeSettings

LOCAL = frozenset({"localhost", "127.0.0.1", "::1", "testserver"})


@dataclass(frozen=True, slots=True)
class Caller:
    """`name` tells callers apart in the logs and in the engine's lines; it gives no key away."""

    name: str
    admin: bool


class Access:
    """Keys, and the number of requests under way."""

    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings
        self.keys = {_digest(k): False for k in settings.api_keys} | {
            _digest(k): True for k in settings.admin_keys
        }
        self.under_way: Counter[str] = Counter()

    def caller(self, request: Request, admin: bool = False) -> Caller:
        """Raises Refusal: 401 without a key that is known, 403 where it is not an admin's."""
        self.refuse_strange_hosts(request)
        if not self.keys:
            return Caller(request.client.host if request.client else "local", True)
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise Refusal(
                401, "this server asks for a key: send Authorization: Bearer KEY", code="missing_api_key"
            )
        given = _digest(key.strip())
        rights = [rights for known, rights in self.keys.items() if hmac.compare_digest(known, given)]
        if not rights:
            raise Refusal(401, "this key is not known here", code="invalid_api_key")
        # Where there is no admin key at all, nobody is one.
        if admin and not rights[0]:
            raise Refusal(403, "this needs an admin's key", "permission_error", "admin_only")
        return Caller(f"key-{given[:8]}", rights[0])

    def refuse_strange_hosts(self, request: Request) -> None:
        """On loopback without keys no web page may speak for its user, under a name that somebody else owns.

        Raises Refusal.
        """
        if self.keys or not self.settings.loopback:
            return
        host = request.headers.get("host", "localhost")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        if name.strip("[]").lower() not in {*LOCAL, self.settings.host}:
            raise Refusal(403, "this server answers to its own address only", "permission_error")
        origin = request.headers.get("origin")
        if origin and request.method != "GET" and origin.partition("://")[2] != host:
            raise Refusal(403, "no other site may ask here", "permission_error")

    @contextmanager
    def enter(self, caller: Caller) -> Iterator[None]:
        """One request more. Raises Refusal 429 where there are too many."""
        total, own = self.under_way.total(), self.under_way[caller.name]
        settings = self.settings
        if total >= settings.max_concurrent or own >= settings.max_concurrent_per_key:
            raise Refusal(
                429,
                f"{max(total, own)} requests are under way: come back later",
                "rate_limit_error",
                "rate_limit_exceeded",
                retry_after=1,
            )
        self.under_way[caller.name] += 1
        try:
            yield
        finally:
            self.under_way[caller.name] -= 1
            if not self.under_way[caller.name]:
                del self.under_way[caller.name]


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
