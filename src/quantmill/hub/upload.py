"""Large files to a hub that takes them in by parts: a file that was cut is gone on with, byte for byte.

Does what huggingface_hub does next anyway, so that it finds the objects there: a hub that does not know
Upload-Offset (draft of the IETF on resumable uploads; our hub in a box does) is left to it entirely.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmill.errors import SourceNotFound
from quantmill.hub import wire
from quantmill.hub.remote import Hashes, token_header

if TYPE_CHECKING:
    from huggingface_hub import HfApi

LARGE = 10_000_000  # bytes from which every hub takes a file as an object
ATTEMPTS = 5  # connections that bring nothing
OFFSET = "upload-offset"
LFS = "application/vnd.git-lfs+json"

Advance = Callable[[int], None]


@dataclass(slots=True)
class Meter:
    """How much of each object has arrived; an object of two branches counts once."""

    advance: Advance = lambda _: None
    _counted: dict[str, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def reached(self, oid: str, count: int) -> None:
        """`count` bytes of an object are there; it never goes back."""
        with self._lock:
            more = count - self._counted.get(oid, 0)
            if more > 0:
                self._counted[oid] = count
                self.advance(more)


@dataclass(slots=True)
class Uploads:
    """The objects of one repository on their way; the same object of two branches travels once."""

    name: str
    api: HfApi
    meter: Meter = field(default_factory=Meter)
    _locks: dict[str, threading.Lock] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def send(self, path: Path, hashes: Hashes) -> bool:
        """Bring an object there. False where the hub cannot go on with cut uploads: it was not sent then.

        Raises SourceNotFound when the connection breaks again and again.
        """
        if hashes.size < LARGE or not wire.is_direct(self.api.endpoint):
            return False
        with self._lock:
            lock = self._locks.setdefault(hashes.sha256, threading.Lock())
        with lock:
            return self._send(path, hashes)

    def _send(self, path: Path, hashes: Hashes) -> bool:
        fruitless, before = 0, -1
        while fruitless < ATTEMPTS:
            time.sleep(min(5.0, 0.1 * 2**fruitless) if fruitless else 0)  # somebody else may be sending it
            try:
                link = self._link(hashes)
                if link is None:
                    self.meter.reached(hashes.sha256, hashes.size)
                    return True  # it is there
                offset = _offset(link)
                if offset is None:
                    return False
                fruitless, before = (0 if offset > before else fruitless), offset
                self.meter.reached(hashes.sha256, offset)
                reply = wire.send_file(
                    link,
                    path,
                    offset,
                    {OFFSET: str(offset)},
                    lambda count: self.meter.reached(hashes.sha256, count),
                )
            except ConnectionError:
                fruitless += 1
                continue
            if reply.status == 200:
                return True
            if reply.status not in (409, 422):
                return False  # huggingface_hub will meet the same, and say it
            fruitless += 1
        raise SourceNotFound(f"the connection to the hub broke at {path.name}: type the same again")

    def _link(self, hashes: Hashes) -> str | None:
        """Where the object goes, None where it is there already."""
        from huggingface_hub import get_session, hf_raise_for_status

        asked = {
            "operation": "upload",
            "transfers": ["basic"],
            "hash_algo": "sha256",
            "objects": [{"oid": hashes.sha256, "size": hashes.size}],
        }
        url = f"{self.api.endpoint}/{self.name}.git/info/lfs/objects/batch"
        headers = {"Accept": LFS, "Content-Type": LFS, **token_header(self.api)}
        answer = get_session().post(url, json=asked, headers=headers)
        hf_raise_for_status(answer)
        actions: dict[str, Any] = answer.json()["objects"][0].get("actions") or {}
        return str(actions["upload"]["href"]) if "upload" in actions else None


def _offset(link: str) -> int | None:
    """How much of an object a hub has; None where it does not say, or is not asked directly."""
    if not wire.is_direct(link):
        return None
    reply = wire.ask("HEAD", link, {})
    said = reply.headers.get(OFFSET, "")
    return int(said) if reply.status == 200 and said.isdecimal() else None
