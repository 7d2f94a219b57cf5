"""Bytes that are on the disk before they have a name. Knows nothing of what they are."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from quantmill.files import fsync

TEMPORARY = ".incoming-"


@contextmanager
def writing(path: Path, mode: int = 0o644) -> Iterator[IO[bytes]]:
    """A file to be filled; a reader sees the old one, or none, or the whole new one, also after a power cut."""
    made = make_folders(path.parent)
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    for folder in {path.parent, *made}:
        fsync(folder)


def put(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write a file whole, or not at all."""
    with writing(path, mode) as stream:
        stream.write(data)


def is_inside(folder: Path, path: Path) -> bool:
    """Whether no link on the way leads from a folder elsewhere. What is not there yet may be inside."""
    return os.path.realpath(path) == os.path.join(os.path.realpath(folder), path.relative_to(folder))


def make_folders(folder: Path) -> list[Path]:
    """Create `folder` and what is above it. Returns the folders in which a new name has to be flushed."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        new.mkdir(exist_ok=True)
    return [new.parent for new in missing]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock that `path` stands for, against other threads and other processes; the kernel frees it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def remove_temporaries(root: Path) -> int:
    """Remove what writers that were killed left behind; only where no writer can live. Returns how many."""
    found = list(root.rglob(f"{TEMPORARY}*"))
    for path in found:
        path.unlink()
    return len(found)
