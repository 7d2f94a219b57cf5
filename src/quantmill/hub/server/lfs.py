"""Large files of one repository, each stored once under its sha256: lfs/ab/cd/abcd...

A pointer is the small text that stands for such a file in git. Knows no branches: repository.py says which
objects are in use.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from quantmill.files import fsync
from quantmill.hub.server.disk import TEMPORARY, is_inside, make_folders
from quantmill.hub.server.refusal import Refusal
from quantmill.hub.streams import Digest, Source, pump

BEGUN = ".begun-"  # and the object's name
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
        path = self.folder / oid[:2] / oid[2:4] / oid
        if not is_inside(self.folder.parent, path):
            raise Refusal(403, f"a link leads out of the repository at object {oid}")
        return path

    def size(self, oid: str) -> int | None:
        """Bytes of an object, None where there is none. What has a name is whole."""
        try:
            return self.path(oid).stat().st_size
        except FileNotFoundError:
            return None

    def receive(self, oid: str, size: int) -> Receiving:
        """Begin to take an object in. Raises Refusal (507) where the disk could not hold it."""
        self.make_room(size)
        path = self.folder / f"{TEMPORARY}{secrets.token_hex(8)}"
        return Receiving(self.path(oid), oid, size, path, path.open("x+b", buffering=0), keep=False)

    def resume(self, oid: str, size: int, offset: int) -> Receiving:
        """Go on with an object of which `offset` bytes are here; what comes is kept even if the rest does not.

        Raises Refusal: 409 where so many bytes are not here, or somebody else is sending them; 507.
        """
        self.make_room(size - offset)
        path = self._begun(oid)
        stream = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)
        stream.seek(0, os.SEEK_END)
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.close()
            raise Refusal(409, f"object {oid} is being sent by somebody else") from None
        here = path.stat().st_ino if path.exists() else None  # another, or none, once its owner has finished
        if offset != stream.tell() or os.fstat(stream.fileno()).st_ino != here:
            stream.close()
            raise Refusal(409, f"object {oid} does not go on at byte {offset}: ask again where it does")
        return Receiving(self.path(oid), oid, size, path, stream, keep=True)

    def begun(self, oid: str) -> int:
        """Bytes of an object that are here from an upload that was cut."""
        try:
            return self._begun(oid).stat().st_size
        except FileNotFoundError:
            return 0

    def _begun(self, oid: str) -> Path:
        return self.folder / f"{BEGUN}{oid}"

    def make_room(self, size: int) -> None:
        """Raises Refusal (507) where the disk could not hold so many bytes more."""
        make_folders(self.folder)
        free = os.statvfs(self.folder)
        if size > free.f_bavail * free.f_frsize:
            raise Refusal(507, f"the hub's disk has no room for {size} bytes")

    def all(self) -> list[Path]:
        """Whole objects."""
        return [p for p in self.folder.glob("??/??/*") if p.is_file()]

    def all_begun(self) -> list[Path]:
        """Uploads that were cut."""
        return list(self.folder.glob(f"{BEGUN}*"))


@dataclass(slots=True)
class Receiving:
    """An object on its way in: hashed as it comes, named when all of it is there and is what it should be."""

    target: Path
    oid: str
    size: int
    path: Path
    stream: BinaryIO
    keep: bool  # what is unfinished, for the next attempt

    def take(self, source: Source, announced: int | None = None) -> None:
        """The rest of the object. Raises Refusal: 413 when there is more than announced, 422 when it is another."""
        missing = self.size - self.stream.tell()
        if announced is not None and announced > missing:
            raise Refusal(413, f"object {self.oid} was announced with {self.size} bytes and is longer")
        with Digest(self.stream) as digest:
            pump(source, self.stream, digest, missing, lambda _: None)
            if source.readinto(memoryview(bytearray(1))):
                raise Refusal(413, f"object {self.oid} was announced with {self.size} bytes and is longer")
            received = self.stream.tell()
            found = digest.hexdigest(received) if received == self.size else None
        self._finish(found)

    def _finish(self, found: str | None) -> None:
        """Give the object its name, if it is what that says. `found` None: not all of it came."""
        if found != self.oid:
            self.keep = self.keep and found is None
            raise Refusal(
                422, f"the bytes sent are not object {self.oid} of {self.size} bytes: send it again"
            )
        os.fsync(self.stream.fileno())
        made = make_folders(self.target.parent)
        self.path.replace(self.target)
        for folder in {self.target.parent, *made}:
            fsync(folder)

    def __enter__(self) -> Receiving:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Drop what is unfinished, unless it is to be gone on with."""
        if not self.keep:
            self.path.unlink(missing_ok=True)
        self.stream.close()
