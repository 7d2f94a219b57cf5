"""The ASGI application: reads a request, asks routing.py who answers it, and sends the answer or the refusal.

Handlers are plain functions and run in threads; only large uploads are taken in here, chunk by chunk.
"""

from __future__ import annotations

import asyncio
import ipaddress
import tempfile
from collections.abc import Callable
from typing import IO

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from quantmill.errors import BadRequest
from quantmill.hub.server import api, content, git_http, names, pages
from quantmill.hub.server.accounts import NOBODY, Account
from quantmill.hub.server.refusal import Refusal, bad, no_repository
from quantmill.hub.server.repository import Repository
from quantmill.hub.server.routing import Call, find, split_path
from quantmill.hub.server.store import Store

ROUTES = (*api.ROUTES, *content.ROUTES, *git_http.ROUTES, *pages.ROUTES)
SPOOL, LONGEST_BODY = 8 << 20, 1 << 30  # bytes of a request: in memory, and at most
CHUNK = 1 << 20
SAFE = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}


class App:
    """The hub over one store. `hosts` None: any Host header is taken (behind a proxy, or on a network)."""

    def __init__(self, store: Store, hosts: frozenset[str] | None = None) -> None:
        self.store, self.hosts = store, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        try:
            response = await self._answer(request)
        except Refusal as refusal:
            response = _refused(refusal, request)
        except ClientDisconnect:
            return
        for name, value in SAFE.items():
            response.headers.setdefault(name, value)
        if request.method == "HEAD":
            response = _without_body(response)
        await response(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        self._refuse_strangers(request)
        parts = split_path(request.scope.get("raw_path") or request.url.path.encode())
        if request.method == "PUT" and len(parts) == 6 and parts[2:5] == ["info", "lfs", "objects"]:
            return await self._take_object(request, f"{parts[0]}/{parts[1].removesuffix('.git')}", parts[5])
        row, found = find(ROUTES, request.method, parts)
        account = self._account(request)
        with tempfile.SpooledTemporaryFile(SPOOL) as body:
            await _spool(request, body)
            call = Call(
                self.store,
                account,
                found,
                dict(request.query_params),
                dict(request.headers),
                body,
                f"{request.url.scheme}://{request.headers.get('host', 'localhost')}",
            )
            return await run_in_threadpool(row.handler, call)

    def _account(self, request: Request) -> Account:
        header = request.headers.get("authorization")
        return self.store.accounts.who(header) if header or self.store.accounts.open else NOBODY

    def _refuse_strangers(self, request: Request) -> None:
        """No page in a browser speaks for its user here, under no name that somebody else owns (403)."""
        host = request.headers.get("host", "")
        if (
            self.hosts is not None
            and host.rpartition(":")[0].strip("[]") not in self.hosts
            and host not in self.hosts
        ):
            raise Refusal(403, "this hub answers to its own address only")
        origin = request.headers.get("origin")
        if origin and request.method not in ("GET", "HEAD") and origin.partition("://")[2] != host:
            raise Refusal(403, "no other site may write here")

    async def _take_object(self, request: Request, name: str, oid: str) -> Response:
        """An LFS upload: to the disk and through the hash as it comes."""
        names.object_id(oid)
        owner, _, model = name.partition("/")
        query = dict(request.query_params)
        if not self.store.links.allows("upload", names.repository_name(owner, model), oid, query):
            raise Refusal(403, "this link is not for that, or too old: ask for a new one")
        folder = self.store.root / "repos" / f"{name}.git"
        if not folder.is_dir():  # deleted since the link was made
            raise no_repository(name)
        objects = Repository(folder).objects
        incoming = await run_in_threadpool(objects.receive, oid, int(query["size"]))
        try:
            await _in_chunks(request, incoming.write)
            await run_in_threadpool(incoming.finish)
        finally:
            incoming.close()
        return Response()


async def _in_chunks(request: Request, write: Callable[[bytearray], None]) -> None:
    """Hand the body on in pieces worth a thread's while; the next one comes in while one is written."""
    waiting, writing = bytearray(), asyncio.ensure_future(run_in_threadpool(write, bytearray()))
    try:
        async for chunk in request.stream():
            waiting += chunk
            if len(waiting) >= CHUNK:
                await writing
                writing, waiting = asyncio.ensure_future(run_in_threadpool(write, waiting)), bytearray()
    finally:
        await writing
    await run_in_threadpool(write, waiting)


async def _spool(request: Request, body: IO[bytes]) -> None:
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > LONGEST_BODY:
            raise bad(f"the request is longer than {LONGEST_BODY} bytes")
        body.write(chunk)
    body.seek(0)


def _refused(refusal: Refusal, request: Request) -> Response:
    """A refusal in the words of huggingface_hub: it reads the headers, people read the body."""
    headers = {"X-Error-Message": refusal.message.encode("ascii", "replace").decode()}
    if refusal.code:
        headers["X-Error-Code"] = refusal.code
    if refusal.commit:
        headers["X-Repo-Commit"] = refusal.commit
    if refusal.status == 401:
        headers["WWW-Authenticate"] = 'Basic realm="quantmill hub", charset="UTF-8"'
    if request.method not in ("GET", "HEAD"):
        headers["Connection"] = "close"  # the rest of a refused body is not read
    url = {"url": refusal.url} if refusal.url else {}
    return JSONResponse({"error": refusal.message, **url}, refusal.status, headers)


def _without_body(response: Response) -> Response:
    return Response(status_code=response.status_code, headers=dict(response.headers))


def make_app(store: Store, host: str) -> App:
    """The application for a server on `host`. Raises BadRequest for an open root on a network."""
    if not is_loopback(host):
        if store.accounts.open:
            raise BadRequest(
                f"{host} is reachable by others: first quantmill hub --root DIR --add-token NAME"
            )
        return App(store)
    return App(store, frozenset({"localhost", "127.0.0.1", "::1", host}))


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
