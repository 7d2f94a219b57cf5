"""Tokens and what they may do. Only their hashes are kept, and no message ever carries one.

A root without tokens is open: whoever reaches it reads and writes, but nothing is private. That is for
loopback; app.py refuses to serve such a root to a network.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import secrets
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlencode

from quantmill.errors import BadRequest
from quantmill.hub.server import disk
from quantmill.hub.server.refusal import Refusal

RIGHTS = ("read", "write")
LIFETIME = 24 * 3600  # seconds that a link to an object works


@dataclass(frozen=True, slots=True)
class Account:
    """Who asks. `rights` None: nobody in particular, who sees what is public."""

    name: str
    rights: str | None

    @property
    def may_write(self) -> bool:
        return self.rights == "write"


NOBODY = Account("anonymous", None)
ANYBODY = Account("local", "write")  # in an open root


@dataclass(frozen=True, slots=True)
class Accounts:
    """The tokens of one root."""

    root: Path

    @property
    def _file(self) -> Path:
        return self.root / "tokens.json"

    def _rows(self) -> list[dict[str, str]]:
        return list(json.loads(self._file.read_text())) if self._file.is_file() else []

    @property
    def open(self) -> bool:
        return not self._rows()

    def add(self, name: str, rights: str) -> str:
        """A new token, told this once. Raises BadRequest for a name or right that there is not."""
        if rights not in RIGHTS or not name.isascii() or not name.replace("-", "").isalnum():
            raise BadRequest(f"a token is for a name of letters and digits, to {' or '.join(RIGHTS)}")
        token = f"hf_{secrets.token_hex(20)}"
        row = {"sha256": _digest(token), **asdict(Account(name, rights))}
        disk.put(self._file, json.dumps([*self._rows(), row], indent=2).encode(), mode=0o600)
        return token

    def who(self, authorization: str | None) -> Account:
        """Who an Authorization header stands for. Raises Refusal (401) for a token that is not known."""
        rows = self._rows()
        if not rows:
            return ANYBODY
        if authorization is None:
            return NOBODY
        digest = _digest(_token(authorization))
        for row in rows:
            if hmac.compare_digest(row["sha256"], digest):
                return Account(row["name"], row["rights"])
        raise Refusal(401, "this token is not known here: make one with quantmill hub --add-token")


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _token(header: str) -> str:
    """The token in `Bearer T`, or the password in `Basic ...`, which is what git sends."""
    kind, _, value = header.partition(" ")
    if kind.lower() != "basic":
        return value.strip()
    try:
        return base64.b64decode(value, validate=True).decode().partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        return ""


@dataclass(frozen=True, slots=True)
class Links:
    """Links to one object for one deed, and passes: clients send no token of theirs when they move large files."""

    secret: bytes

    @classmethod
    def load(cls, root: Path) -> Links:
        """The root's secret, made when there is none; links outlive a restart."""
        path = root / "secret"
        if not path.is_file():
            disk.put(path, secrets.token_bytes(32), mode=0o600)
        return cls(path.read_bytes())

    def sign(self, deed: str, repository: str, oid: str, size: int) -> str:
        """The query string that allows `deed` (upload or download)."""
        expires = int(time.time()) + LIFETIME
        seal = self._seal(deed, repository, oid, size, expires)
        return urlencode({"deed": deed, "size": size, "expires": expires, "seal": seal})

    def allows(self, deed: str, repository: str, oid: str, query: dict[str, str]) -> bool:
        """Whether a query string is one of ours, for this, and still good."""
        try:
            size, expires = int(query["size"]), int(query["expires"])
        except (KeyError, ValueError):
            return False
        seal = self._seal(deed, repository, oid, size, expires)
        return expires > time.time() and hmac.compare_digest(seal, query.get("seal", ""))

    def pass_for(self, deed: str, *about: str) -> tuple[str, int]:
        """What to send as a token for `deed`, and when it expires (seconds since 1970)."""
        expires = int(time.time()) + LIFETIME
        return f"{expires}-{self._seal(deed, *about, expires)}", expires

    def knows(self, authorization: str, deed: str, *about: str) -> bool:
        """Whether an Authorization header holds a pass of ours for this, still good."""
        expires, _, seal = _token(authorization).partition("-")
        if not expires.isdecimal() or not expires.isascii() or int(expires) < time.time():
            return False
        return hmac.compare_digest(self._seal(deed, *about, int(expires)).encode(), seal.encode())

    def _seal(self, *parts: object) -> str:
        return hmac.new(self.secret, json.dumps(parts).encode(), hashlib.sha256).hexdigest()
