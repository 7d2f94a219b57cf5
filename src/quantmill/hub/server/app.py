"""From a request to its answer: who asks, from where, for what row of the table; refusals become answers.

Handlers are plain functions; only large uploads go straight from the connection into the object store.
"""

from __future__ import annotations

import ipaddress
from urllib.parse import parse_qsl

from quantmill.errors import BadRequest
from quantmill.hub.server import api, cas, content, git_http, names, pages
from quantmill.hub.server.accounts import NOBODY, Account
from quantmill.hub.server.answers import Answer, as_json
from quantmill.hub.server.http import Request
from quantmill.hub.server.refusal import Refusal, no_repository
from quantmill.hub.server.repository import Repository
from quantmill.hub.server.routing import Call, find, split_path
from quantmill.hub.server.store import Store

ROUTES = (*api.ROUTES, *cas.ROUTES, *content.ROUTES, *git_http.ROUTES, *pages.ROUTES)
OFFSET = "upload-offset"  # where a client goes on with an object; the answer to HEAD says where it may
LONGEST_MESSAGE = 500  # characters
SAFE = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "Referrer-Policy": "no-referrer",
}


class App:
    """The hub over one store. `hosts` None: any Host header is taken (behind a proxy, or on a network)."""

    def __init__(self, store: Store, hosts: frozenset[str] | None = None) -> None:
        self.store, self.hosts = store, hosts

    def __call__(self, request: Request) -> Answer:
        try:
            answer = self._answer(request)
        except Refusal as refusal:
            answer = _refused(refusal, request)
        for name, value in SAFE.items():
            answer.headers.setdefault(name, value)
        return answer

    def _answer(self, request: Request) -> Answer:
        self._refuse_strangers(request)
        path, _, query = request.target.partition("?")
        parts, asked = split_path(path.encode("latin-1", "replace")), dict(parse_qsl(query))
        taken = request.method == "PUT" or (request.method == "HEAD" and asked.get("deed") == "upload")
        if taken and len(parts) == 6 and parts[2:5] == ["info", "lfs", "objects"]:
            return self._object(request, f"{parts[0]}/{parts[1].removesuffix('.git')}", parts[5], asked)
        row, found = find(ROUTES, request.method, parts)
        account = NOBODY if row.sealed else self._account(request)
        base = (
            f"{request.headers.get('x-forwarded-proto', 'http')}://{request.headers.get('host', 'localhost')}"
        )
        with request.incoming.spooled(row.longest) as body:
            return row.handler(Call(self.store, account, found, asked, request.headers, body, base))

    def _account(self, request: Request) -> Account:
        header = request.headers.get("authorization")
        return self.store.accounts.who(header) if header or self.store.accounts.open else NOBODY

    def _refuse_strangers(self, request: Request) -> None:
        """No page in a browser speaks for its user here, under no name that somebody else owns (403)."""
        host = request.headers.get("host", "")
        known = self.hosts is None or host in self.hosts or host.rpartition(":")[0].strip("[]") in self.hosts
        if not known:
            raise Refusal(403, "this hub answers to its own address only")
        origin = request.headers.get("origin")
        if origin and request.method not in ("GET", "HEAD") and origin.partition("://")[2] != host:
            raise Refusal(403, "no other site may write here")

    def _object(self, request: Request, name: str, oid: str, query: dict[str, str]) -> Answer:
        """PUT takes an LFS object in, to the disk and through the hash as it comes; HEAD says what is there of it.

        With Upload-Offset a PUT goes on where an earlier one was cut, and keeps what comes if it is cut, too.
        """
        names.object_id(oid)
        owner, _, model = name.partition("/")
        name = names.repository_name(owner, model)
        if not self.store.links.allows("upload", name, oid, query):
            raise Refusal(403, "this link is not for that, or too old: ask for a new one")
        folder = self.store.folder(name)
        if not folder.is_dir():  # deleted since the link was made
            raise no_repository(name)
        objects, size = Repository(folder).objects, int(query["size"])
        if request.method == "HEAD":
            whole = objects.size(oid) is not None
            return Answer(headers={"Upload-Offset": str(size if whole else objects.begun(oid))})
        offset = request.headers.get(OFFSET)
        if offset is None:
            receiving = objects.receive(oid, size)
        elif offset.isdecimal():
            receiving = objects.resume(oid, size, int(offset))
        else:
            raise Refusal(400, "Upload-Offset is a number of bytes")
        with receiving:
            receiving.take(request.incoming.source, request.incoming.length)
        return Answer()


def _refused(refusal: Refusal, request: Request) -> Answer:
    """A refusal in the words of huggingface_hub: it reads the headers, people read the body."""
    headers = {"X-Error-Message": _one_line(refusal.message)}
    if refusal.code:
        headers["X-Error-Code"] = refusal.code
    if refusal.commit:
        headers["X-Repo-Commit"] = refusal.commit
    if refusal.status == 401:
        headers["WWW-Authenticate"] = 'Basic realm="quantmill hub", charset="UTF-8"'
    url = {"url": refusal.url} if refusal.url else {}
    return as_json({"error": refusal.message, **url}, refusal.status, headers)


def _one_line(message: str) -> str:
    """A message as a header may hold it: what a client sent is in it, and could be anything."""
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in message)[:LONGEST_MESSAGE]


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
    """Whether a host's name or address is this machine's own."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
