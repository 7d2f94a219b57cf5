"""Bytes on their way, hashed as they pass: both ends of an upload and of a download. Knows no protocol.

hashlib lets other threads run, so the hash of one piece is computed while the next one is read and written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Protocol

PIECE = 1 << 20  # bytes at a time: two of them stay in a core's cache


class Source(Protocol):
    """Something to read from."""

    def readinto(self, buffer: memoryview, /) -> int | None:
        """Fill a buffer as far as there is something; how many bytes, 0 at the end."""


class Digest:
    """A sha256 that is computed in a thread of its own. To be closed, or used with `with`."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def update(self, data: memoryview | bytes) -> None:
        """Take the next bytes; they may change only after the call that follows this one."""
        self._settle()
        self._pending = self._thread.submit(self._hash.update, data)

    def hexdigest(self) -> str:
        """Of everything so far."""
        self._settle()
        return self._hash.hexdigest()

    def restart(self) -> None:
        """Forget everything."""
        self._settle()
        self._hash = hashlib.sha256()

    def _settle(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def __enter__(self) -> Digest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._thread.shutdown()


def pump(source: Source, sink: BinaryIO, digest: Digest, most: int, advance: Callable[[int], None]) -> int:
    """Move up to `most` bytes, through the hash. Returns how many there were; `advance` hears of every piece."""
    buffers = [memoryview(bytearray(min(PIECE, max(1, most)))) for _ in range(2)]
    moved = 0
    while moved < most:
        buffer = buffers[0][: most - moved]
        count = source.readinto(buffer)
        if not count:
            break
        digest.update(buffer[:count])
        sink.write(buffer[:count])
        moved += count
        advance(count)
        buffers.reverse()
    return moved


def hash_prefix(path: Path, digest: Digest) -> int:
    """Send what a file holds through the hash. Returns its bytes."""
    with path.open("rb", buffering=0) as stream, open("/dev/null", "wb", buffering=0) as nowhere:
        return pump(stream, nowhere, digest, path.stat().st_size, lambda _: None)
