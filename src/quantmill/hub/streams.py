"""Bytes on their way, hashed as they pass: both ends of an upload and of a download. Knows no protocol.

hashlib lets other threads run, so one thread hashes what another has just written, out of the page cache.
Sockets block in the kernel until a piece is full: every return to Python is a wait for its lock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import mmap
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from io import BufferedReader
from queue import SimpleQueue
from types import TracebackType
from typing import BinaryIO, Protocol

PIECE = 1 << 20  # bytes at a time
PIECES = 1 << 24  # bytes that are shown to a hash at once
WINDOW = 32 << 20  # bytes after which the disk is set to work
_SHOWN = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)


class Source(Protocol):
    """Something to read from."""

    def readinto(self, buffer: memoryview, /) -> int | None:
        """Fill a buffer as far as there is something; how many bytes, 0 at the end."""


class SocketSource:
    """The next `count` bytes of a blocking socket, of which a buffered reader may hold the first."""

    def __init__(self, connection: socket.socket, reader: BufferedReader, count: int) -> None:
        self.connection, self.reader, self.left = connection, reader, count
        self.buffered = True  # perhaps

    def readinto(self, buffer: memoryview, /) -> int:
        """Raises ConnectionError where the other side stops, TimeoutError where it is silent (see `patient`)."""
        wanted = min(len(buffer), self.left)
        if not wanted:
            return 0
        if self.buffered:
            begun = len(self.reader.peek())
            count = self.reader.readinto(buffer[: min(wanted, begun)])
            self.buffered = begun > count
        else:
            count = receive(self.connection, buffer[:wanted])
        if not count:
            raise ConnectionResetError("the other side stopped in the middle")
        self.left -= count
        return count


def receive(connection: socket.socket, buffer: memoryview) -> int:
    """Fill a buffer from a blocking socket; less only at its end. Raises TimeoutError."""
    try:
        return connection.recv_into(buffer, 0, socket.MSG_WAITALL)
    except BlockingIOError:
        raise TimeoutError("the other side is silent") from None


def patient(connection: socket.socket, seconds: int) -> None:
    """Let a socket block in the kernel, but not for longer than that. A silent one ends with BlockingIOError."""
    limit = struct.pack("@ll", seconds, 0)
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


class Digest:
    """The sha256 of a file that grows, computed in a thread that follows its end. To be used with `with`."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash, self._done = file.fileno(), hashlib.sha256(), 0
        self._failure: Exception | None = None
        self._orders: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while (order := self._orders.get()) is not None:
            try:
                order()
            except (OSError, ValueError) as error:  # no room, no disk, no such mapping
                self._failure = error

    def _hash_to(self, end: int) -> None:
        """Out of the page cache itself: reading would copy every byte once more."""
        while self._done < min(end, os.fstat(self._file).st_size):
            begin = self._done - self._done % mmap.ALLOCATIONGRANULARITY
            window = min(end - begin, PIECES)
            with (
                mmap.mmap(self._file, window, flags=_SHOWN, prot=mmap.PROT_READ, offset=begin) as mapped,
                memoryview(mapped) as view,
            ):
                self._hash.update(view[self._done - begin :])
            self._done = begin + window

    def _forget(self) -> None:
        self._hash, self._done = hashlib.sha256(), 0

    def grown_to(self, end: int) -> None:
        """The file holds `end` bytes now."""
        self._orders.put(lambda: self._hash_to(end))

    def restart(self) -> None:
        """Forget everything. Afterwards the thread is at rest, and the file may be cut."""
        done = threading.Event()
        self._orders.put(self._forget)
        self._orders.put(done.set)
        done.wait()

    def hexdigest(self, end: int) -> str:
        """Of the first `end` bytes, when the thread has come that far. Raises OSError where it could not."""
        found: SimpleQueue[str] = SimpleQueue()
        self.grown_to(end)
        self._orders.put(lambda: found.put(self._hash.hexdigest()))
        digest = found.get()
        if self._failure:
            raise OSError(f"what has come cannot be read again: {self._failure}")
        return digest

    def __enter__(self) -> Digest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the thread, when it has come to the end."""
        self._orders.put(None)
        self._thread.join()


def pump(source: Source, sink: BinaryIO, digest: Digest, most: int, advance: Callable[[int], None]) -> int:
    """Append up to `most` bytes to a file, its digest following. Returns how many there were.

    `advance` hears of every piece. Raises what the source raises; what came until then is in the file.
    """
    begin = written = at_work = hashing = sink.tell()
    for count in _appended(source, sink, most):
        written += count
        advance(count)
        if written - hashing >= PIECE:
            digest.grown_to(written)
            hashing = written
        if written - at_work >= WINDOW:
            start_writing(sink, at_work, written)
            at_work = written
    return written - begin


def _appended(source: Source, sink: BinaryIO, most: int) -> Iterator[int]:
    """Append up to `most` bytes to a file. Yields how many came, piece by piece."""
    buffer = memoryview(bytearray(min(PIECE, max(1, most))))
    while most and (count := source.readinto(buffer[:most]) or 0):
        write_all(sink, buffer[:count])
        most -= count
        yield count
        if isinstance(source, SocketSource) and not source.buffered and hasattr(os, "splice"):
            with _Pipe() as pipe:
                while count := pipe.carry(source, sink, most):
                    most -= count
                    yield count


class _Pipe:
    """From a socket into a file without a copy in between: the kernel hands its pages over. Linux only."""

    SIZE, SET_SIZE = 1 << 20, 1031  # bytes; F_SETPIPE_SZ

    def __enter__(self) -> _Pipe:
        self.out, self.into = os.pipe()
        with contextlib.suppress(OSError):  # a smaller one will do
            fcntl.fcntl(self.into, self.SET_SIZE, self.SIZE)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.out)
        os.close(self.into)

    def carry(self, source: SocketSource, sink: BinaryIO, most: int) -> int:
        """The next bytes, `most` at most. 0: not from here to there, or at the end."""
        wanted = min(most, source.left, self.SIZE)
        if not wanted:
            return 0
        try:
            count = os.splice(source.connection.fileno(), self.into, wanted)
        except BlockingIOError:
            raise TimeoutError("the other side is silent") from None
        if not count:
            raise ConnectionResetError("the other side stopped in the middle")
        source.left -= count
        self._empty(count, sink)
        return count

    def _empty(self, count: int, sink: BinaryIO) -> None:
        while count:
            try:
                count -= os.splice(self.out, sink.fileno(), count)
            except OSError as error:
                if error.errno != errno.EINVAL:  # a file system that cannot
                    raise
                data = os.read(self.out, count)
                write_all(sink, memoryview(data))
                count -= len(data)


def write_all(sink: BinaryIO, data: memoryview) -> None:
    """All of it: a raw file may take less at a time."""
    while data:
        data = data[sink.write(data) :]


def start_writing(sink: BinaryIO, begin: int, end: int) -> None:
    """Let the disk begin with a part of a file, so that fsync finds little to do."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(sink.fileno(), begin, end - begin, os.POSIX_FADV_DONTNEED)
