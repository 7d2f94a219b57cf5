"""HTTP/1.1 over threads: a connection has one, reads block, files leave by sendfile. Knows no hub.

An event loop would touch every byte of a weight file several times; a thread that blocks in the kernel does not.
"""

from __future__ import annotations

import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BufferedReader
from typing import IO

from quantmill.hub.server.answers import Answer, FilePart
from quantmill.hub.server.refusal import Refusal, bad
from quantmill.hub.streams import SocketSource, Source, patient

SPOOL = 8 << 20  # bytes of a request that stay in memory
PATIENCE = 120  # seconds that a connection may be silent
MOST_CONNECTIONS = 256
PIECE = 1 << 18
DRAINED = 1 << 20  # bytes of a refused body that are read, so that the client reads the refusal


class Incoming:
    """The body of one request, which is read from the connection once. `length` None: in chunks."""

    def __init__(self, connection: socket.socket, stream: BufferedReader, length: int | None) -> None:
        self.stream, self.length = stream, length
        self.whole = SocketSource(connection, stream, length or 0)
        self.left = 0  # of the present chunk
        self.more = length is None  # another chunk follows

    @property
    def source(self) -> Source:
        """What to read it from: where its length is known, the connection itself."""
        return self if self.length is None else self.whole

    @property
    def finished(self) -> bool:
        return not self.left and not self.more and not self.whole.left

    def readinto(self, buffer: memoryview) -> int:
        """The next bytes, 0 at the end. Raises ConnectionError where the client stops before it."""
        if self.length is not None:
            return self.whole.readinto(buffer)
        if self.more and not self.left:
            self._next_chunk()
        wanted = min(len(buffer), self.left)
        if not wanted:
            return 0
        count = self.stream.readinto(buffer[:wanted])
        if not count:
            raise ConnectionResetError("the client stopped in the middle of its body")
        self.left -= count
        if not self.left:
            self.stream.readline(8)  # the line end after a chunk
        return count

    def _next_chunk(self) -> None:
        line = self.stream.readline(100)
        try:
            self.left = int(line.partition(b";")[0], 16)
        except ValueError:
            raise bad("a chunk of the body has no length") from None
        if self.left < 0:
            raise bad("a chunk of the body has no length")
        if self.left == 0:
            self.more = False
            while self.stream.readline(8192) not in (b"\r\n", b"\n", b""):
                pass

    def spooled(self, longest: int) -> IO[bytes]:
        """All of it, in memory or in a temporary file. Raises Refusal (413) when it is too long."""
        if (self.length or 0) > longest:
            raise Refusal(413, f"the request is longer than {longest} bytes")
        body = tempfile.SpooledTemporaryFile(SPOOL)  # noqa: SIM115  (the caller closes it)
        buffer, size = memoryview(bytearray(PIECE)), 0
        while count := self.readinto(buffer):
            size += count
            if size > longest:
                body.close()
                raise Refusal(413, f"the request is longer than {longest} bytes")
            body.write(buffer[:count])
        body.seek(0)
        return body


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked, headers by small names; `target` is the path as it was sent."""

    method: str
    target: str
    headers: dict[str, str]
    incoming: Incoming


Application = Callable[[Request], Answer]


class Server(ThreadingHTTPServer):
    """Serves an application on a socket that listens already."""

    daemon_threads = True

    def __init__(self, listener: socket.socket, application: Application) -> None:
        super().__init__(listener.getsockname()[:2], _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket, self.application = listener, application
        self.free = threading.BoundedSemaphore(MOST_CONNECTIONS)
        self.busy = 0  # requests being answered
        self.counting = threading.Lock()

    def process_request(self, request: socket.socket | tuple[bytes, socket.socket], client: object) -> None:
        """A thread for a connection, as long as there are not too many."""
        if not self.free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client)

    def process_request_thread(
        self, request: socket.socket | tuple[bytes, socket.socket], client: object
    ) -> None:
        try:
            super().process_request_thread(request, client)
        finally:
            self.free.release()

    def handle_error(self, request: object, client: object) -> None:
        """A client that goes away is no event."""
        if not isinstance(sys.exception(), OSError):
            traceback.print_exc()


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "quantmill-hub", ""
    disable_nagle_algorithm = True
    server: Server
    rfile: BufferedReader

    def setup(self) -> None:
        super().setup()
        patient(self.connection, PATIENCE)

    def answer(self) -> None:
        """One request."""
        with self.server.counting:
            self.server.busy += 1
        try:
            self._answer()
        except (ConnectionError, TimeoutError, BlockingIOError):
            self.close_connection = True
        finally:
            with self.server.counting:
                self.server.busy -= 1

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = answer

    def _answer(self) -> None:
        headers = {k.lower(): v for k, v in self.headers.items()}
        length = self._length()
        if length == -1:
            self.close_connection = True
            return self._send(Answer(400, {"Connection": "close"}, b"the body's length is unclear"))
        incoming = Incoming(self.connection, self.rfile, length)
        answer = self.server.application(Request(self.command, self.path, headers, incoming))
        self._drain(incoming)
        if not incoming.finished:
            self.close_connection = True
            answer.headers["Connection"] = "close"
        return self._send(answer)

    def _length(self) -> int | None:
        """Bytes of the body; None: in chunks; -1: it says both, or neither rightly (request smuggling)."""
        lengths, coded = self.headers.get_all("content-length", []), self.headers.get("transfer-encoding")
        if coded is not None:
            return None if coded.strip().lower() == "chunked" and not lengths else -1
        if len(lengths) > 1 or any(not v.strip().isdecimal() for v in lengths):
            return -1
        return int(lengths[0]) if lengths else 0

    def _drain(self, incoming: Incoming) -> None:
        """Read what is left of a body that nobody wanted, if it is short."""
        buffer, drained = memoryview(bytearray(PIECE)), 0
        while not incoming.finished and drained < DRAINED:
            drained += incoming.readinto(buffer) or DRAINED

    def _send(self, answer: Answer) -> None:
        try:
            status = HTTPStatus(answer.status)
            self.send_response(status)
            for name, value in answer.headers.items():
                self.send_header(name, value.replace("\r", " ").replace("\n", " "))
            if status not in (HTTPStatus.NOT_MODIFIED, HTTPStatus.NO_CONTENT):
                self.send_header("Content-Length", str(answer.length))
            self.end_headers()
            if self.command != "HEAD" and answer.length:
                self._send_body(answer)
        finally:
            answer.close()

    def _send_body(self, answer: Answer) -> None:
        body = answer.body
        if isinstance(body, bytes):
            self.wfile.write(body)
        elif isinstance(body, FilePart):
            sent = self.connection.sendfile(body.stream, body.begin, body.count)
            if sent != body.count:  # somebody cut the file
                self.close_connection = True
        else:
            for piece in body.pieces:
                self.wfile.write(piece)

    def log_message(self, format: str, *words: object) -> None:
        """Silent: tokens and names are nobody's business."""
