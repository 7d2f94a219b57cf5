"""`git clone` and `git fetch` over HTTP, spoken by dulwich. Pushing is refused: `hf upload` writes."""

from __future__ import annotations

import gzip
import tempfile
import zlib
from collections.abc import Iterator
from typing import IO

from dulwich.errors import GitProtocolError
from dulwich.protocol import ReceivableProtocol
from dulwich.server import BackendRepo, DictBackend, UploadPackHandler

from quantmill.hub.server.answers import Answer, Pieces
from quantmill.hub.server.refusal import Refusal, bad
from quantmill.hub.server.routing import Call, Route, route

SERVICE = "git-upload-pack"
CHUNK = 1 << 20  # bytes
SPOOL = 8 << 20  # bytes of an answer that stay in memory


def advertise(call: Call) -> Answer:
    """The branches, as git asks for them first."""
    if call.query.get("service") != SERVICE:
        raise Refusal(403, "this hub takes no git push: use hf upload, or quantmill publish")
    first = f"# service={SERVICE}\n".encode()
    return _talk(call, f"{len(first) + 4:04x}".encode() + first + b"0000", advertise=True)


def upload_pack(call: Call) -> Answer:
    """The pack that a client lacks."""
    return _talk(call, b"", advertise=False)


def _talk(call: Call, first: bytes, *, advertise: bool) -> Answer:
    repository = call.store.find(call.name, call.account)
    body = gzip.GzipFile(fileobj=call.body) if call.headers.get("content-encoding") == "gzip" else call.body
    out = tempfile.SpooledTemporaryFile(SPOOL)  # noqa: SIM115  (closed when it has been sent)
    out.write(first)
    with repository.git() as git:
        proto = ReceivableProtocol(body.read, out.write)
        backends: dict[str, BackendRepo] = {"/": git}
        handler = UploadPackHandler(
            DictBackend(backends), ["/"], proto, stateless_rpc=True, advertise_refs=advertise
        )
        try:
            handler.handle()
        except (EOFError, zlib.error, GitProtocolError):
            out.close()
            raise bad("the request is not git's") from None
    kind = "advertisement" if advertise else "result"
    headers = {"Cache-Control": "no-cache", "Content-Type": f"application/x-{SERVICE}-{kind}"}
    return Answer(headers=headers, body=Pieces(_sent(out), out.tell()))


def _sent(out: IO[bytes]) -> Iterator[bytes]:
    with out:
        out.seek(0)
        while chunk := out.read(CHUNK):
            yield chunk


def push(_: Call) -> Answer:
    """Refused: what is pushed would not be checked."""
    raise Refusal(403, "this hub takes no git push: use hf upload, or quantmill publish")


ROUTES: tuple[Route, ...] = (
    route("GET /{owner}/{name}/info/refs", advertise),
    route("POST /{owner}/{name}/git-upload-pack", upload_pack),
    route("POST /{owner}/{name}/git-receive-pack", push),
)
