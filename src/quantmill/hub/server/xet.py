"""Xorbs of one repository on their way into its objects: xet/ab/abcd..., unpacked, and what is known of them.

A client sends xorbs, then a shard that says which of their chunks make up which file. The file becomes an
ordinary object; a xorb whose chunks are all in objects is dropped, and only where they are is kept, so that a
client need not send again what it sent before. Whenever anything is lost that clients may count on, all of it
goes, and the epoch, which is part of the address that they send to, is another one.
"""

from __future__ import annotations

import io
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from quantmill.hub.server import disk
from quantmill.hub.server.lfs import Objects
from quantmill.hub.server.refusal import Refusal, bad
from quantmill.hub.server.repository import Repository
from quantmill.hub.server.shard import Assembly, Segment
from quantmill.hub.server.xorb import unpack

FOLDER, RAW, GONE = "xet", ".raw", ".gone-"
EPOCH, LOCK = "epoch", "xet.lock"
ATTEMPTS = 3  # to read chunks that others move from a xorb into an object meanwhile


@dataclass(frozen=True, slots=True)
class Place:
    """Where chunks `first` to `last`, without the last, of a xorb are: in an object, from byte `offset` on."""

    first: int
    last: int
    oid: str
    offset: int


@dataclass(frozen=True, slots=True)
class Piece:
    """`count` bytes from `offset` on: of an object, or (None) of the xorb itself."""

    oid: str | None
    offset: int
    count: int


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a xorb: where its chunks end, in bytes, and which of them are in objects."""

    ends: tuple[int, ...]
    places: tuple[Place, ...] = ()

    @classmethod
    def read(cls, text: bytes) -> Known:
        found = json.loads(text)
        return cls(tuple(found["ends"]), tuple(Place(**p) for p in found["places"]))

    def text(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    def begin(self, chunk: int) -> int:
        """The byte at which a chunk begins."""
        return self.ends[chunk - 1] if chunk else 0

    def pieces(self, first: int, last: int) -> Iterator[Piece]:
        """Where the bytes of chunks `first` to `last` are, in their order, without the last."""
        while first < last:
            place = next((p for p in self.places if p.first <= first < p.last), None)
            if place:
                end = min(last, place.last)
                offset = place.offset + self.begin(first) - self.begin(place.first)
            else:
                end = min((p.first for p in self.places if first < p.first), default=last)
                end, offset = min(last, end), self.begin(first)
            yield Piece(place.oid if place else None, offset, self.begin(end) - self.begin(first))
            first = end

    def without(self, place: Place) -> Known:
        """The same, where chunks of it are in an object now."""
        return Known(self.ends, (*self.places, place))

    @property
    def settled(self) -> bool:
        """Whether all of it is in objects."""
        return all(p.oid for p in self.pieces(0, len(self.ends)))


@dataclass(frozen=True, slots=True)
class Xorbs:
    """The xorbs in `folder`, which become objects of `objects`."""

    folder: Path
    objects: Objects

    @classmethod
    def of(cls, repository: Repository) -> Xorbs:
        folder = repository.folder / FOLDER
        if not disk.is_inside(repository.folder, folder):
            raise Refusal(403, "a link leads out of the repository")
        return cls(folder, repository.objects)

    def epoch(self) -> str:
        """Another one whenever something was dropped; made where there is none."""
        path = self.folder / EPOCH
        try:
            return path.read_text()
        except FileNotFoundError:
            with disk.locked(self.folder.with_name(LOCK)):
                if not path.exists():
                    disk.put(path, secrets.token_hex(8).encode())
                return path.read_text()

    def take(self, name: str, body: IO[bytes]) -> bool:
        """Unpack a xorb to the disk. False where it is here. Raises Refusal: 400, 507."""
        if self._path(name).is_file():
            return False
        size = body.seek(0, os.SEEK_END)
        body.seek(0)
        self.objects.make_room(size)
        with disk.writing(self._raw(name)) as raw:
            ends = unpack(body, raw)
        disk.put(self._path(name), Known(tuple(ends)).text())
        return True

    def assemble(self, assembly: Assembly) -> None:
        """Make an object of a file. Raises Refusal: 400 where xorbs are missing or give another file; 507."""
        for _ in range(ATTEMPTS):
            try:
                self._receive(assembly)
                self._settle(assembly)
            except FileNotFoundError:
                continue
            except Refusal as refusal:
                if refusal.status == 507:
                    raise
                break
            return
        self.forget()
        raise bad(f"what was sent does not make up file {assembly.sha256}: send it again")

    def _receive(self, assembly: Assembly) -> None:
        """Take a file into the objects, from the pieces that it consists of."""
        oid, size, pieces = assembly.sha256, assembly.size, self._pieces(assembly)
        if self.objects.size(oid) == size and _is_whole(oid, pieces):
            return
        with self.objects.receive(oid, size) as receiving, _Pieces(self, pieces) as source:
            receiving.take(source)

    def _pieces(self, assembly: Assembly) -> list[tuple[str, Piece]]:
        """Xorb and piece, in the order of the file."""
        known = {s.xorb: self._known(s.xorb) for s in assembly.segments}
        found = list[tuple[str, Piece]]()
        for segment in assembly.segments:
            _refuse_beyond(segment, known[segment.xorb])
            found += [(segment.xorb, p) for p in known[segment.xorb].pieces(segment.first, segment.last)]
        return found

    def open(self, xorb: str, piece: Piece) -> IO[bytes]:
        """The file that a piece is in, at the piece. Raises FileNotFoundError."""
        stream = (self.objects.path(piece.oid) if piece.oid else self._raw(xorb)).open("rb", buffering=0)
        stream.seek(piece.offset)
        return stream

    def _settle(self, assembly: Assembly) -> None:
        """Note where chunks are now, and drop xorbs that are not needed any more."""
        offset = 0
        with disk.locked(self.folder.with_name(LOCK)):
            for segment in assembly.segments:
                place = Place(segment.first, segment.last, assembly.sha256, offset)
                offset += segment.size
                known = self._known(segment.xorb)
                if any(p.oid is None for p in known.pieces(segment.first, segment.last)):
                    known = known.without(place)
                    disk.put(self._path(segment.xorb), known.text())
                if known.settled:
                    self._raw(segment.xorb).unlink(missing_ok=True)

    def forget(self) -> tuple[int, int]:
        """Drop everything, and with it what clients know of it. Returns how many files that were, and bytes."""
        gone = self.folder.with_name(f"{GONE}{secrets.token_hex(8)}")
        try:
            self.folder.rename(gone)
        except FileNotFoundError:
            return 0, 0
        sizes = [p.stat().st_size for p in gone.rglob("*") if p.is_file()]
        shutil.rmtree(gone)
        return len(sizes), sum(sizes)

    def forget_old(self, seconds: float) -> None:
        """Drop everything where a xorb has waited that long for its shard."""
        if any(time.time() - p.stat().st_mtime > seconds for p in self.folder.glob(f"??/*{RAW}")):
            self.forget()

    def _known(self, name: str) -> Known:
        return Known.read(self._path(name).read_bytes())

    def _path(self, name: str) -> Path:
        path = self.folder / name[:2] / name
        if not disk.is_inside(self.folder, path):
            raise Refusal(403, f"a link leads out of the repository at xorb {name}")
        return path

    def _raw(self, name: str) -> Path:
        return self._path(name).with_name(f"{name}{RAW}")


class _Pieces:
    """Pieces of files, one after the other, as something to read from."""

    def __init__(self, xorbs: Xorbs, pieces: list[tuple[str, Piece]]) -> None:
        self._xorbs, self._pieces = xorbs, iter(pieces)
        self._stream: IO[bytes] = io.BytesIO()
        self._left = 0  # bytes of the present piece

    def readinto(self, buffer: memoryview, /) -> int:
        """Raises FileNotFoundError where a piece is not there any more."""
        while not self._left:
            following = next(self._pieces, None)
            if following is None:
                return 0
            self._stream.close()
            self._stream, self._left = self._xorbs.open(*following), following[1].count
        data = self._stream.read(min(len(buffer), self._left))
        if not data:
            raise FileNotFoundError("a xorb is shorter than it was")
        buffer[: len(data)] = data
        self._left -= len(data)
        return len(data)

    def __enter__(self) -> _Pieces:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()


def _is_whole(oid: str, pieces: list[tuple[str, Piece]]) -> bool:
    """Whether pieces are one object, from its beginning to its end."""
    offset = 0
    for _, piece in pieces:
        if (piece.oid, piece.offset) != (oid, offset):
            return False
        offset += piece.count
    return True


def _refuse_beyond(segment: Segment, known: Known) -> None:
    """Raises Refusal (400) for chunks that a xorb has not, or of another size."""
    if not 0 <= segment.first < segment.last <= len(known.ends):
        raise bad(f"xorb {segment.xorb} has no chunks {segment.first} to {segment.last}")
    if known.begin(segment.last) - known.begin(segment.first) != segment.size:
        raise bad(f"chunks {segment.first} to {segment.last} of xorb {segment.xorb} have another size")
