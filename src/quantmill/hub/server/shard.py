"""A shard, by which xet clients say what files are made of: ranges of chunks of xorbs that were sent before.

Format: https://huggingface.co/docs/xet/shard. Records of 48 bytes, little-endian: a hash of 32 and four numbers. Of
its sections only the files matter here; what xorbs hold is known from the xorbs.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from quantmill.hub.server.refusal import bad

LONGEST = 64 << 20  # bytes
TAG = b"HFRepoMetaData\0" + bytes.fromhex("5569 6745 6a7b 8157 83a5 bdd9 5ccd d14a a9")
VERSION = 2
VERIFIED, WITH_SHA256 = 1 << 31, 1 << 30  # flags of a file: what follows its segments
END = b"\xff" * 32

_HEAD = struct.Struct("<32sQQ")
_RECORD = struct.Struct("<32sIIII")


@dataclass(frozen=True, slots=True)
class Segment:
    """Chunks `first` to `last`, without the last, of a xorb; `size` bytes."""

    xorb: str
    first: int
    last: int
    size: int


@dataclass(frozen=True, slots=True)
class Assembly:
    """A file, by its sha256, and what it consists of."""

    sha256: str
    segments: tuple[Segment, ...]

    @property
    def size(self) -> int:
        return sum(s.size for s in self.segments)


def read_shard(data: bytes) -> tuple[Assembly, ...]:
    """The files that a shard describes. Raises Refusal (400)."""
    try:
        tag, version, _ = _HEAD.unpack_from(data)
        if tag != TAG or version != VERSION:
            raise bad(f"this is no shard of version {VERSION}")
        return tuple(_files(data))
    except struct.error:
        raise bad("the shard ends too early") from None


def _files(data: bytes) -> Iterator[Assembly]:
    at = _HEAD.size
    while True:
        name, flags, count, _, _ = _RECORD.unpack_from(data, at)
        if name == END:
            return
        if not flags & WITH_SHA256:
            raise bad("a file of the shard comes without its sha256")
        records = [_RECORD.unpack_from(data, at + _RECORD.size * (1 + i)) for i in range(count)]
        at += _RECORD.size * (1 + count * (2 if flags & VERIFIED else 1))
        digest = _RECORD.unpack_from(data, at)[0]
        at += _RECORD.size
        segments = (Segment(as_text(x), first, last, size) for x, _, size, first, last in records)
        yield Assembly(as_text(digest), tuple(segments))


def as_text(digest: bytes) -> str:
    """A hash as xet writes it: four numbers of 64 bits, each in hexadecimal digits."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", digest))
