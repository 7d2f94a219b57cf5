"""The bytes: files of a revision, by ranges, and LFS objects in both directions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

from quantmill.hub.server import names
from quantmill.hub.server.answers import Answer, FilePart, as_json
from quantmill.hub.server.refusal import Refusal, bad
from quantmill.hub.server.repository import Repository
from quantmill.hub.server.routing import Call, Route, route

# What a browser may draw; everything else is bytes to be kept.
PICTURES = {
    "png": "image/png",
    "jpg": "image/jpeg",
    "jpeg": "image/jpeg",
    "gif": "image/gif",
    "webp": "image/webp",
}
LFS_JSON = "application/vnd.git-lfs+json"
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


def resolve(call: Call) -> Answer:
    """A file of a branch or commit. HEAD says what GET would send."""
    repository = call.store.find(call.name, call.account)
    commit = repository.resolve(call.parts["revision"])
    entry = repository.find(commit, call.parts["path"])
    name = quote(entry.path.rpartition("/")[2])
    headers = {
        "Content-Type": PICTURES.get(name.rpartition(".")[2].lower(), "application/octet-stream"),
        "X-Repo-Commit": commit,
        "ETag": f'"{entry.etag}"',
        "Accept-Ranges": "bytes",
        "Content-Disposition": f"attachment; filename*=UTF-8''{name}",
    }
    if entry.pointer:
        headers |= {"X-Linked-Etag": f'"{entry.etag}"', "X-Linked-Size": str(entry.size)}
        return _send_object(call, repository, entry.pointer.oid, headers)
    return _send(call, repository.read(entry.blob).as_raw_string(), entry.size, headers)


def _send_object(call: Call, repository: Repository, oid: str, headers: dict[str, str]) -> Answer:
    size = repository.objects.size(oid)
    if size is None:
        raise Refusal(404, f"object {oid} is not here", "EntryNotFound")
    return _send(call, repository.objects.path(oid), size, headers)


def _send(call: Call, source: bytes | Path, size: int, headers: dict[str, str]) -> Answer:
    """All of it, a range (206), or nothing where the client has it (304). Raises Refusal (416)."""
    headers = {"Content-Type": "application/octet-stream", **headers}
    if headers.get("ETag") and call.headers.get("if-none-match") == headers["ETag"]:
        return Answer(304, headers)
    begin, end = 0, size
    asked = _RANGE.fullmatch(call.headers.get("range", ""))
    stale = call.headers.get("if-range") not in (None, headers.get("ETag"))
    if asked and any(asked.groups()) and not stale:
        begin, end = _bounds(asked, size)
        headers["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
    status = 206 if "Content-Range" in headers else 200
    if isinstance(source, bytes):
        return Answer(status, headers, source[begin:end])
    return Answer(status, headers, FilePart(source.open("rb", buffering=0), begin, end - begin))


def _bounds(asked: re.Match[str], size: int) -> tuple[int, int]:
    first, last = asked.groups()
    if not first:  # the last so many bytes
        return max(0, size - int(last)), size
    begin, end = int(first), min(size, int(last) + 1 if last else size)
    if begin >= end:
        raise Refusal(416, f"the file has {size} bytes")
    return begin, end


def batch(call: Call) -> Answer:
    """git-lfs asks where objects go or come from; the links that it gets need no token."""
    asked = call.json()
    deed = asked.get("operation")
    if deed not in ("upload", "download"):
        raise bad("operation must be upload or download")
    repository = call.store.find(call.name, call.account, write=deed == "upload")
    rows = asked.get("objects")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise bad("objects must be a list of objects")
    found = [
        _upload(call, repository, r) if deed == "upload" else _download(call, repository, r) for r in rows
    ]
    answer = {"transfer": "basic", "hash_algo": "sha256", "objects": found}
    return as_json(answer, kind=LFS_JSON)


def _upload(call: Call, repository: Repository, row: dict[str, Any]) -> dict[str, Any]:
    oid, size = names.object_id(row.get("oid")), int(row.get("size") or 0)
    fixed = {"oid": oid, "size": size}
    if repository.objects.size(oid) == size:
        return fixed  # nothing to do
    link = _link(call, "upload", oid, size)
    verify = f"{call.base}/{call.name}.git/info/lfs/verify"
    header = {"header": {"Authorization": call.headers["authorization"]}} if _has_token(call) else {}
    return {
        **fixed,
        "authenticated": True,
        "actions": {"upload": {"href": link}, "verify": {"href": verify, **header}},
    }


def _has_token(call: Call) -> bool:
    return "authorization" in call.headers


def _download(call: Call, repository: Repository, row: dict[str, Any]) -> dict[str, Any]:
    oid = names.object_id(row.get("oid"))
    size = repository.objects.size(oid)
    if size is None:
        error = {"code": 404, "message": f"object {oid} is not here"}
        return {"oid": oid, "size": int(row.get("size") or 0), "error": error}
    link = _link(call, "download", oid, size)
    return {"oid": oid, "size": size, "authenticated": True, "actions": {"download": {"href": link}}}


def _link(call: Call, deed: str, oid: str, size: int) -> str:
    query = call.store.links.sign(deed, call.name, oid, size)
    return f"{call.base}/{call.name}.git/info/lfs/objects/{oid}?{query}"


def download_object(call: Call) -> Answer:
    """A large file by a signed link. Raises Refusal 403 for one that is not for it, or too old."""
    oid = names.object_id(call.parts["oid"])
    if not call.store.links.allows("download", call.name, oid, call.query):
        raise Refusal(403, "this link is not for that, or too old: ask for a new one")
    repository = Repository(call.store.folder(call.name))
    return _send_object(call, repository, oid, {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})


def verify(call: Call) -> Answer:
    """That an uploaded object arrived whole. Raises Refusal 404 where it did not."""
    asked = call.json()
    repository = call.store.find(call.name, call.account, write=True)
    oid = names.object_id(asked.get("oid"))
    if repository.objects.size(oid) != asked.get("size"):
        raise Refusal(404, f"object {oid} did not arrive")
    return as_json({}, kind=LFS_JSON)


_LFS = "/{owner}/{name}/info/lfs"
ROUTES: tuple[Route, ...] = (
    route("GET /{owner}/{name}/resolve/{revision}/{path*}", resolve),
    route("GET /{owner}/{name}/raw/{revision}/{path*}", resolve),
    route(f"POST {_LFS}/objects/batch", batch),
    route(f"POST {_LFS}/verify", verify),
    route(f"GET {_LFS}/objects/{{oid}}", download_object),
)
