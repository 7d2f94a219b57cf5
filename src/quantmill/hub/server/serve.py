"""Serve a store until a signal comes. Knows the socket, not what is sent."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from quantmill.errors import BadRequest
from quantmill.hub.server.app import make_app
from quantmill.hub.server.http import Server
from quantmill.hub.server.store import Store

GRACE = 5.0  # seconds


def serve(root: Path, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serve `root`; port 0 takes a free one. `ready` gets the address when connections are accepted.

    Raises BadRequest for an address that is taken, a root that another hub serves, or an open one on a network.
    """
    store = Store.open(root)
    app = make_app(store, host)
    with store.served(), _listen(host, port) as listener:
        address = listener.getsockname()[1]
        server = Server(listener, app)
        with _until_a_signal(server):
            ready(f"http://{f'[{host}]' if ':' in host else host}:{address}")
            server.serve_forever(poll_interval=0.2)
        _let_finish(server)


@contextmanager
def _until_a_signal(server: Server) -> Iterator[None]:
    """SIGINT and SIGTERM end serve_forever; from outside its thread, as it must be."""

    def stop(number: int, frame: object) -> None:
        threading.Thread(target=server.shutdown, daemon=True).start()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _let_finish(server: Server) -> None:
    """Requests that are being answered get a moment; cutting them would do no harm."""
    until = time.monotonic() + GRACE
    while server.busy and time.monotonic() < until:
        time.sleep(0.05)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise BadRequest(f"cannot listen on {host}:{port} ({error.strerror}): use another --port") from None
    return listener
