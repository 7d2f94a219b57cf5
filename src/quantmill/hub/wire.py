"""Large files over plain HTTP, by the kernel where it can: sendfile out, one copy in.

huggingface_hub's client moves bytes through many layers of Python, which costs more than hashing them. Where a
hub is reached without TLS and without a proxy this module opens the connection itself; elsewhere, and whenever
something is not as expected, it says None, and the caller uses huggingface_hub's client. Knows HTTP, no hub.
"""

from __future__ import annotations

import errno
import http.client
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from quantmill.hub.streams import SocketSource, patient

PATIENCE = 60  # seconds without a byte
AT_ONCE = 1 << 24  # bytes between two words on how far a file got
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)


@dataclass(frozen=True, slots=True)
class Reply:
    """The head of an answer, and its body where it was read."""

    status: int
    headers: Mapping[str, str]  # by small names
    body: bytes = b""


def is_direct(url: str) -> bool:
    """Whether a URL is reached by a plain connection to its host."""
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        return False
    return "http" not in urllib.request.getproxies() or bool(urllib.request.proxy_bypass(parts.hostname))


@contextmanager
def connection(url: str) -> Iterator[tuple[http.client.HTTPConnection, str]]:
    """A connection to the host of a URL, and what to ask it for. Turns HTTP's own errors into ConnectionError."""
    parts = urlsplit(url)
    link = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=PATIENCE, blocksize=1 << 18)
    try:
        link.connect()
        patient(link.sock, PATIENCE)
        yield link, parts.path + (f"?{parts.query}" if parts.query else "")
    except (http.client.HTTPException, OSError) as error:
        if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
            raise
        raise ConnectionError(str(error) or type(error).__name__) from error
    finally:
        link.close()


def ask(method: str, url: str, headers: Mapping[str, str]) -> Reply:
    """A request without a body. Raises ConnectionError."""
    with connection(url) as (link, target):
        link.request(method, target, headers=dict(headers))
        return _reply(link.getresponse())


def send_file(
    url: str, path: Path, begin: int, headers: Mapping[str, str], reached: Callable[[int], None]
) -> Reply:
    """PUT the bytes of a file from `begin` on; `reached` hears how far it got. Raises ConnectionError."""
    count = path.stat().st_size - begin
    with connection(url) as (link, target), path.open("rb") as stream:
        link.putrequest("PUT", target)
        for name, value in {**headers, "Content-Length": str(count)}.items():
            link.putheader(name, value)
        link.endheaders()
        try:
            for offset in range(begin, begin + count, AT_ONCE):
                link.sock.sendfile(stream, offset, min(AT_ONCE, begin + count - offset))
                reached(min(offset + AT_ONCE, begin + count))
        except (BrokenPipeError, ConnectionResetError):  # refused in the middle: the answer says why
            pass
        return _reply(link.getresponse())


def body_of(link: http.client.HTTPConnection, response: http.client.HTTPResponse) -> SocketSource | None:
    """The body of an answer as the socket gives it, None where its length is not known."""
    length = response.headers.get("Content-Length", "")
    if link.sock is None or not length.isdecimal():
        return None
    return SocketSource(link.sock, response.fp, int(length))


def _reply(response: http.client.HTTPResponse) -> Reply:
    headers = {k.lower(): v for k, v in response.getheaders()}
    return Reply(response.status, headers, response.read(1 << 20))
