"""A xorb, in which xet clients send pieces of files: chunks, each with a head of 8 bytes and compressed by itself.

Format: https://huggingface.co/docs/xet/xorb. Head: version (0), compressed size in 3 bytes, scheme, size in 3
bytes, all little-endian. Some clients add a footer, which says nothing that the heads do not say.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import IO

import lz4.frame

from quantmill.hub.server.refusal import bad

LONGEST = 64 << 20  # bytes, of a xorb as sent and unpacked
LONGEST_CHUNK = 128 << 10  # bytes, unpacked
MOST_CHUNKS = 8 << 10
FOOTER = b"XETBLOB"

_HEAD = struct.Struct("<BHBBHB")


def unpack(source: IO[bytes], sink: IO[bytes]) -> list[int]:
    """Write the chunks of a xorb, one after the other. Returns where each of them ends, in bytes.

    Raises Refusal (400) for what is no xorb, or one beyond the limits.
    """
    ends, size = list[int](), 0
    while head := source.read(_HEAD.size):
        if head.startswith(FOOTER):
            break
        if len(head) < _HEAD.size:
            raise bad("the xorb ends in the middle of a chunk's head")
        chunk = _chunk(head, source)
        size += len(chunk)
        if size > LONGEST or len(ends) == MOST_CHUNKS:
            raise bad(f"the xorb holds more than {LONGEST} bytes or {MOST_CHUNKS} chunks")
        sink.write(chunk)
        ends.append(size)
    if not ends:
        raise bad("the xorb is empty")
    return ends


def _chunk(head: bytes, source: IO[bytes]) -> bytes:
    version, packed_low, packed_high, scheme, low, high = _HEAD.unpack(head)
    packed_size, size = packed_low | packed_high << 16, low | high << 16
    if version or scheme not in SCHEMES or not 0 < size <= LONGEST_CHUNK or packed_size > 2 * LONGEST_CHUNK:
        raise bad("a chunk of the xorb has a head that is not understood")
    packed = source.read(packed_size)
    chunk = SCHEMES[scheme](packed, size) if len(packed) == packed_size else b""
    if len(chunk) != size:
        raise bad("a chunk of the xorb has not the size that its head says")
    return chunk


def _plain(packed: bytes, size: int) -> bytes:
    return packed


def _lz4(packed: bytes, size: int) -> bytes:
    """An LZ4 frame, of which `size` bytes and one more are unpacked at most."""
    try:
        chunk: bytes = lz4.frame.LZ4FrameDecompressor().decompress(packed, max_length=size + 1)
    except (RuntimeError, EOFError):
        raise bad("a chunk of the xorb is no LZ4") from None
    return chunk


def _grouped(packed: bytes, size: int) -> bytes:
    """LZ4 of every fourth byte from the first on, then from the second on, and so forth."""
    grouped, whole, begin = _lz4(packed, size), bytearray(size), 0
    if len(grouped) != size:
        return grouped
    for place in range(4):
        count = (size - place + 3) // 4
        whole[place::4] = grouped[begin : begin + count]
        begin += count
    return bytes(whole)


SCHEMES: dict[int, Callable[[bytes, int], bytes]] = {0: _plain, 1: _lz4, 2: _grouped}
