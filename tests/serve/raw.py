"""Requests as bytes on a socket: what no client library would send."""

from __future__ import annotations

import json
import socket
from typing import Any


def exchange(port: int, data: bytes, timeout: float = 120) -> tuple[int, bytes]:
    """Send bytes, read to the end -> status and body (chunks not put together)."""
    with socket.create_connection(("127.0.0.1", port), timeout) as s:
        s.sendall(data)
        got = b""
        while part := s.recv(1 << 16):
            got += part
    head, _, body = got.partition(b"\r\n\r\n")
    return int(head.split(None, 2)[1]), body


def post(port: int, path: str, body: bytes, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
    lines = {"Host": "localhost", "Content-Type": "application/json", "Connection": "close"}
    lines |= {"Content-Length": str(len(body))} | (headers or {})
    head = "".join(f"{k}: {v}\r\n" for k, v in lines.items())
    return exchange(port, f"POST {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + body)


def post_json(port: int, path: str, data: Any, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    status, body = post(port, path, json.dumps(data).encode(), headers)
    return status, json.loads(body)
