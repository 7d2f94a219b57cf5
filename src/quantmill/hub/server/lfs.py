"""Large files of one repository, each stored once under its sha256: lfs/ab/cd/abcd...

A pointer is the small text that stands for such a file in git. Knows no branches: repository.py says which
objects are in use.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from quantmill.files import fsync
from quantmill.hub.server.disk import TEMPORARY, make_folders
from quantmill.hub.server.refusal import Refusal

LARGE = 10_000_000  # bytes from which any file goes here
SUFFIXES = (
    *(
        ".7z",
        ".arrow",
        ".bin",
        ".bz2",
        ".ckpt",
        ".ftz",
        ".gguf",
        ".gz",
        ".h5",
        ".joblib",
        ".model",
        ".msgpack",
    ),
    *(".npy", ".npz", ".onnx", ".ot", ".parquet", ".pb", ".pickle", ".pkl", ".pt", ".pth", ".rar", ".tar"),
    *(".safetensors", ".tflite", ".tgz", ".wasm", ".xz", ".zip", ".zst"),
)

_POINTER = re.compile(
    rb"version https://git-lfs\.github\.com/spec/v1\noid sha256:([0-9a-f]{64})\nsize (\d{1,18})\n"
)
_LONGEST_POINTER = 200


@dataclass(frozen=True, slots=True)
class Pointer:
    """A large file: its sha256 and its size in bytes."""

    oid: str
    size: int

    def text(self) -> bytes:
        lines = ("version https://git-lfs.github.com/spec/v1", f"oid sha256:{self.oid}", f"size {self.size}")
        return "".join(f"{line}\n" for line in lines).encode()


def read_pointer(blob: bytes) -> Pointer | None:
    """The pointer that a git blob is, None where it is a file of its own."""
    found = _POINTER.fullmatch(blob) if len(blob) <= _LONGEST_POINTER else None
    return Pointer(found[1].decode(), int(found[2])) if found else None


def is_large(path: str, size: int) -> bool:
    """Whether a file belongs here: by its kind, or by its size. An empty one never does."""
    return size > 0 and (size >= LARGE or path.lower().endswith(SUFFIXES))


@dataclass(frozen=True, slots=True)
class Objects:
    """The object store in `folder`."""

    folder: Path

    def path(self, oid: str) -> Path:
        return self.folder / oid[:2] / oid[2:4] / oid

    def size(self, oid: str) -> int | None:
        """Bytes of an object, None where there is none. What has a name is whole."""
        try:
            return self.path(oid).stat().st_size
        except FileNotFoundError:
            return None

    def receive(self, oid: str, size: int) -> Incoming:
        """Begin to take an object in. Raises Refusal (507) where the disk could not hold it."""
        make_folders(self.folder)
        free = os.statvfs(self.folder)
        if size > free.f_bavail * free.f_frsize:
            raise Refusal(507, f"the hub's disk has no room for {size} bytes")
        path = self.folder / f"{TEMPORARY}{secrets.token_hex(8)}"
        return Incoming(self.path(oid), oid, size, path, path.open("xb", buffering=0))

    def all(self) -> list[Path]:
        return [p for p in self.folder.glob("??/??/*") if p.is_file()]


@dataclass(slots=True)
class Incoming:
    """An object on its way in: hashed as it comes, named when all of it is there and is what it should be."""

    target: Path
    oid: str
    size: int
    path: Path
    stream: BinaryIO
    received: int = 0
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)

    def write(self, data: bytes | bytearray) -> None:
        """Take the next bytes. Raises Refusal (413) when there are more than announced."""
        self.received += len(data)
        if self.received > self.size:
            raise Refusal(413, f"object {self.oid} was announced with {self.size} bytes and is longer")
        self.digest.update(data)
        self.stream.write(data)

    def finish(self) -> None:
        """Give the object its name. Raises Refusal (422) when it is not what its name says."""
        if self.received != self.size or self.digest.hexdigest() != self.oid:
            raise Refusal(
                422, f"the bytes sent are not object {self.oid} of {self.size} bytes: send it again"
            )
        os.fsync(self.stream.fileno())
        made = make_folders(self.target.parent)
        self.path.replace(self.target)
        for folder in {self.target.parent, *made}:
            fsync(folder)

    def close(self) -> None:
        """Drop what is unfinished."""
        self.stream.close()
        self.path.unlink(missing_ok=True)
