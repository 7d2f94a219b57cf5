"""Serve a store by uvicorn until a signal comes. Knows the socket, not what is sent."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

from quantmill.errors import BadRequest
from quantmill.hub.server.app import make_app
from quantmill.hub.server.store import Store


def serve(root: Path, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serve `root`; port 0 takes a free one. `ready` gets the address when connections are accepted.

    Raises BadRequest for an address that is taken, a root that another hub serves, or an open one on a network.
    """
    import uvicorn

    store = Store.open(root)
    app = make_app(store, host)
    with store.served(), _listen(host, port) as listener:
        address = listener.getsockname()[1]
        ready(f"http://{f'[{host}]' if ':' in host else host}:{address}")
        config = uvicorn.Config(
            app, log_level="error", access_log=False, lifespan="off", timeout_graceful_shutdown=5
        )
        uvicorn.Server(config).run(sockets=[listener])


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
