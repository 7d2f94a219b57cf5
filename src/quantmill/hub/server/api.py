"""The JSON half of the protocol: who am I, repositories, branches, commits, trees. One function per row."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

from quantmill.hub.server import names
from quantmill.hub.server.answers import Answer, as_json
from quantmill.hub.server.lfs import Pointer, is_large
from quantmill.hub.server.refusal import Refusal, bad, no_entry
from quantmill.hub.server.repository import Change, Entry, Repository
from quantmill.hub.server.routing import Call, Route, route
from quantmill.hub.server.store import ATTRIBUTES, FILTER

LONGEST_LINE = 64_000_000  # bytes of a commit's line: a regular file, in base64


def whoami(call: Call) -> Answer:
    """The account behind the call's token. Raises Refusal 401 without one."""
    if call.account.rights is None:
        raise Refusal(401, "no token was sent: set HF_TOKEN, or 'hf auth login'")
    token = {"displayName": call.account.name, "role": call.account.rights}
    who = {"type": "user", "id": call.account.name, "name": call.account.name, "fullname": call.account.name}
    return as_json({**who, "orgs": [], "auth": {"type": "access_token", "accessToken": token}})


def create_repository(call: Call) -> Answer:
    """Make an empty repository. Raises Refusal 409, which names the address, where it is there."""
    asked = call.json()
    if asked.get("type") not in (None, "model"):
        raise bad("this hub holds models only")
    name = f"{asked.get('organization') or call.account.name}/{asked.get('name')}"
    try:
        call.store.create(name, call.account, private=_asks_private(asked))
    except Refusal as refusal:
        if refusal.status == 409:
            refusal.url = f"{call.base}/{name}"
        raise
    return as_json({"url": f"{call.base}/{name}", "name": name, "id": name})


def _asks_private(asked: dict[str, Any]) -> bool:
    return bool(asked.get("private")) or asked.get("visibility") not in (None, "public")


def delete_repository(call: Call) -> Answer:
    """Delete a repository with all that it holds."""
    asked = call.json()
    call.store.delete(f"{asked.get('organization') or call.account.name}/{asked.get('name')}", call.account)
    return Answer()


def change_settings(call: Call) -> Answer:
    """Make a repository public or private."""
    call.store.set_private(call.name, call.account, _asks_private(call.json()))
    return as_json({})


def list_models(call: Call) -> Answer:
    """The repositories that this account may see, by `search` and `author`."""
    wanted, author = call.query.get("search", "").lower(), call.query.get("author")
    found = []
    for name in call.store.list():
        if wanted in name.lower() and author in (None, name.partition("/")[0]):
            try:
                call.store.find(name, call.account)
            except Refusal:
                continue
            found.append({"id": name, "modelId": name, **_public_facts(call, name)})
    return as_json(found)


def _public_facts(call: Call, name: str) -> dict[str, Any]:
    facts = call.store.facts(name)
    return {
        "private": facts["private"],
        "createdAt": facts["created"],
        "tags": [],
        "downloads": 0,
        "likes": 0,
    }


def model_info(call: Call) -> Answer:
    """One revision of a repository: its commit, its files and, where asked for, their sizes and sums."""
    repository = call.store.find(call.name, call.account)
    commit = repository.resolve(call.parts.get("revision", "main"))
    entries = repository.entries(commit)
    blobs = call.query.get("blobs", "").lower() in ("1", "true")
    info = {
        "_id": call.name,
        "id": call.name,
        "modelId": call.name,
        "author": call.name.partition("/")[0],
        "sha": commit,
        "lastModified": _date(repository.commit_of(commit).commit_time),
        "gated": False,
        "disabled": False,
        "usedStorage": sum(e.size for e in entries),
        **_public_facts(call, call.name),
        "siblings": [_sibling(e, blobs) for e in entries],
    }
    return as_json(info, headers={"X-Repo-Commit": commit})


def _sibling(entry: Entry, blobs: bool) -> dict[str, Any]:
    if not blobs:
        return {"rfilename": entry.path}
    lfs = {"lfs": {"sha256": entry.pointer.oid, **_lfs(entry.pointer)}} if entry.pointer else {}
    return {"rfilename": entry.path, "size": entry.size, "blobId": entry.blob, **lfs}


def _lfs(pointer: Pointer) -> dict[str, Any]:
    return {"size": pointer.size, "pointerSize": len(pointer.text())}


def _date(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(seconds))


def tree(call: Call) -> Answer:
    """Files, and folders in between, below a path; all levels where `recursive`."""
    repository = call.store.find(call.name, call.account)
    commit = repository.resolve(call.parts["revision"])
    prefix = f"{names.file_path(call.parts['path'])}/" if call.parts["path"] else ""
    inside = [e for e in repository.entries(commit) if e.path.startswith(prefix)]
    if prefix and not inside:
        raise no_entry(call.parts["path"], commit)
    if call.query.get("recursive", "").lower() not in ("1", "true"):
        rows = list(dict.fromkeys(e.path[len(prefix) :].partition("/")[0] for e in inside))
        direct = {e.path: e for e in inside}
        found = [_row(direct.get(prefix + r), prefix + r) for r in rows]
    else:
        found = [_row(e, e.path) for e in inside]
    return as_json(found, headers={"X-Repo-Commit": commit})


def _row(entry: Entry | None, path: str) -> dict[str, Any]:
    if entry is None:
        return {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}
    lfs = {"lfs": {"oid": entry.pointer.oid, **_lfs(entry.pointer)}} if entry.pointer else {}
    return {"type": "file", "path": path, "oid": entry.blob, "size": entry.size, **lfs}


def paths_info(call: Call) -> Answer:
    """What some paths of a revision are."""
    repository = call.store.find(call.name, call.account)
    commit = repository.resolve(call.parts["revision"])
    entries = {e.path: e for e in repository.entries(commit)}
    asked = [value for key, value in call.form() if key in ("paths", "paths[]")]
    found = []
    for path in asked:
        if path in entries:
            found.append(_row(entries[path], path))
        elif any(p.startswith(f"{path}/") for p in entries):
            found.append(_row(None, path))
    return as_json(found)


def refs(call: Call) -> Answer:
    """The branches; there are no tags."""
    branches = call.store.find(call.name, call.account).branches()
    rows = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in branches.items()]
    return as_json({"branches": rows, "tags": [], "converts": [], "pullRequests": []})


def commits(call: Call) -> Answer:
    """The history of a revision, newest first."""
    repository = call.store.find(call.name, call.account)
    found = []
    for item in repository.history(repository.resolve(call.parts["revision"])):
        author = item.author.decode(errors="replace").partition(" <")[0]
        title, _, rest = item.message.decode(errors="replace").partition("\n\n")
        row = {"id": item.id.decode(), "title": title, "message": rest, "date": _date(item.commit_time)}
        found.append({**row, "authors": [{"user": author}]})
    return as_json(found)


def create_branch(call: Call) -> Answer:
    """Make a branch at `startingPoint`, or at main."""
    repository = call.store.find(call.name, call.account, write=True)
    repository.create_branch(call.parts["branch"], str(call.json().get("startingPoint") or "main"))
    return as_json({})


def delete_branch(call: Call) -> Answer:
    """Delete a branch."""
    call.store.find(call.name, call.account, write=True).delete_branch(call.parts["branch"])
    return as_json({})


def preupload(call: Call) -> Answer:
    """Which files go to the object store, and what the branch holds already (the client skips the same)."""
    repository = call.store.find(call.name, call.account, write=True)
    entries = {e.path: e for e in repository.entries(repository.resolve(call.parts["revision"]))}
    rows = []
    for asked in _list(call.json(), "files"):
        path, size = names.file_path(str(asked.get("path"))), int(asked.get("size") or 0)
        mode = "lfs" if is_large(path, size) else "regular"
        oid = entries[path].etag if path in entries else None
        rows.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return as_json({"files": rows})


def _list(asked: dict[str, Any], key: str) -> list[dict[str, Any]]:
    rows = asked.get(key)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise bad(f"{key} must be a list of objects")
    return rows


def commit(call: Call) -> Answer:
    """A header and one line per change, as newline-delimited JSON."""
    repository = call.store.find(call.name, call.account, write=True)
    branch = call.parts["revision"]
    if names.is_commit(branch):
        raise bad("a commit goes on a branch: name one")
    header, changes = dict[str, Any](), list[Change]()
    for key, value in _lines(call):
        if key == "header":
            header = value
        else:
            changes.append(_change(key, value, repository))
    changes += _attributes(repository, branch, changes)
    message = str(header.get("summary") or "update")
    if description := header.get("description"):
        message += f"\n\n{description}"
    parent = header.get("parentCommit")
    made = repository.commit(branch, changes, message, call.account.name, str(parent) if parent else None)
    url = f"{call.base}/{call.name}/commit/{made}"
    return as_json({"success": True, "commitOid": made, "commitUrl": url, "hookOutput": ""})


def _lines(call: Call) -> Iterator[tuple[str, dict[str, Any]]]:
    while line := call.body.readline(LONGEST_LINE):
        try:
            row = json.loads(line)
            yield str(row["key"]), dict(row["value"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise bad("a line of the commit is not understood, or longer than 64 MB") from None


def _change(key: str, value: dict[str, Any], repository: Repository) -> Change:
    path = names.file_path(str(value.get("path")))
    if key == "file":
        try:
            plain = value.get("encoding") == "utf-8"
            text = str(value.get("content"))
            data = text.encode() if plain else base64.b64decode(text, validate=True)
            return Change(path, _stored(data, repository) if is_large(path, len(data)) else data)
        except binascii.Error:
            raise bad(f"the content of {path!a} is no base64") from None
    if key == "lfsFile":
        oid = names.object_id(value.get("oid"))
        size = repository.objects.size(oid)
        if size is None or value.get("size", size) != size:
            raise bad(f"object {oid} was not uploaded: upload it, then send the commit again")
        return Change(path, Pointer(oid, size))
    if key in ("deletedFile", "deletedFolder", "deletedEntry"):
        return Change(path, None, folder=key != "deletedFile")
    raise bad(f"a commit's line is called {key[:40]!a}: file, lfsFile, deletedFile or deletedFolder")


def _stored(data: bytes, repository: Repository) -> Pointer:
    """A large file that came in the commit itself, put where large files are."""
    oid = hashlib.sha256(data).hexdigest()
    if repository.objects.size(oid) is None:
        with repository.objects.receive(oid, len(data)) as receiving:
            receiving.take(io.BytesIO(data))
    return Pointer(oid, len(data))


def _attributes(repository: Repository, branch: str, changes: list[Change]) -> list[Change]:
    """What .gitattributes needs, so that git-lfs knows every large file of the commit. At most one change."""
    large = [c.path for c in changes if isinstance(c.content, Pointer)]
    given = next((c.content for c in changes if c.path == ATTRIBUTES), None)
    if isinstance(given, bytes):
        rules = given.decode(errors="replace")
    else:
        old = repository.branches().get(branch)
        entry = repository.blobs(old).get(ATTRIBUTES) if old else None
        rules = repository.read(entry).as_raw_string().decode(errors="replace") if entry else ""
    known = [line.split(" ")[0] for line in rules.splitlines() if "filter=lfs" in line]
    unknown = [p for p in large if not _covered(p, known)]
    if not unknown:
        return []
    added = "".join(f"{_quoted(p)} {FILTER}\n" for p in sorted(unknown))
    return [
        Change(
            ATTRIBUTES, f"{rules}{'' if rules.endswith(chr(10)) or not rules else chr(10)}{added}".encode()
        )
    ]


def _covered(path: str, patterns: list[str]) -> bool:
    return any(p == _quoted(path) or (p.startswith("*.") and path.endswith(p[1:])) for p in patterns)


def _quoted(path: str) -> str:
    """A path as a pattern of .gitattributes: from the top, nothing in it special."""
    special = {"*": "\\*", "?": "\\?", "[": "\\[", " ": "[[:space:]]"}
    return "/" + "".join(special.get(c, c) for c in path)


def validate_yaml(_: Call) -> Answer:
    """Cards are checked by the public hub; this one takes any."""
    return as_json({"errors": [], "warnings": []})


def healthy(_: Call) -> Answer:
    """That the server answers."""
    return as_json({"ok": True})


_MODEL = "/api/models/{owner}/{name}"
_TABLE: dict[str, Callable[[Call], Answer]] = {
    "GET /api/healthy": healthy,
    "GET /api/whoami-v2": whoami,
    "GET /api/models": list_models,
    "POST /api/validate-yaml": validate_yaml,
    "POST /api/repos/create": create_repository,
    "DELETE /api/repos/delete": delete_repository,
    f"PUT {_MODEL}/settings": change_settings,
    f"GET {_MODEL}": model_info,
    f"GET {_MODEL}/revision/{{revision}}": model_info,
    f"GET {_MODEL}/refs": refs,
    f"GET {_MODEL}/commits/{{revision}}": commits,
    f"GET {_MODEL}/tree/{{revision}}/{{path*}}": tree,
    f"POST {_MODEL}/paths-info/{{revision}}": paths_info,
    f"POST {_MODEL}/branch/{{branch}}": create_branch,
    f"DELETE {_MODEL}/branch/{{branch}}": delete_branch,
    f"POST {_MODEL}/preupload/{{revision}}": preupload,
    f"POST {_MODEL}/commit/{{revision}}": commit,
}
ROUTES: tuple[Route, ...] = tuple(route(line, handler) for line, handler in _TABLE.items())
