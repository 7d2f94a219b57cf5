"""Every trick with a name, through every route that takes one: refused, and nothing outside the root is touched."""

from __future__ import annotations

import http.client
import json
import os
from urllib.parse import quote

import pytest

import hub_folders
from quantmill.hub.server.store import Store

TRICKS = {
    "up": "../../../outside",
    "up twice quoted": "%2e%2e/%2e%2e/outside",
    "slash twice quoted": "..%2foutside",
    "dots": "..",
    "absolute": "/etc/passwd",
    "backslashes": "..\\..\\outside",
    "drive": "C:/outside",
    "nul": "a\0b",
    "line": "a\r\nX-Evil: 1",
    "zero width": "a\u200bb",
    "right to left": "a\u202etxt.exe",
    "decomposed": "e\u0301",
    "full width dots": "\uff0e\uff0e/outside",
    "surrogate": "\ud800",
    "not assigned": "a\U000effff",
    "long": "x" * 4000,
    "deep": "d/" * 2000 + "f",
    "git": ".git/config",
    "lock": "a.lock/..",
    "blank": " ",
}
LINKS = ("linked", "evil")  # a repository and an owner that are links to another place
OID = "0" * 64


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A hub with a writer, a repository with files, links that lead out of it, and a secret outside."""
    base = tmp_path_factory.mktemp("paths")
    root = base / "root"
    store = Store.open(root)
    token = store.accounts.add("writer", "write")
    for name in ("writer/model", "writer/taken"):
        store.create(name, store.accounts.who(f"Bearer {token}"), private=False)
    (base / "outside").mkdir()
    (base / "outside" / "secret").write_text("SECRET-OUTSIDE")
    (base / "outside" / "sub").mkdir()
    (root / "repos/writer/taken.git").rename(base / "outside" / "taken.git")
    repos = root / "repos"
    (repos / "writer" / "linked.git").symlink_to(base / "outside" / "taken.git")
    (repos / "evil").symlink_to(base / "outside")
    heads = repos / "writer/model.git/refs/heads"
    (heads / "out").symlink_to(base / "outside" / "secret")
    (heads / "away").symlink_to(base / "outside" / "sub")
    (repos / "writer/model.git/lfs/ee").symlink_to(base / "outside" / "sub")
    hub = hub_folders.Hub.start(root)
    yield hub, token, base
    hub.stop()


def raw(text: str) -> str:
    """As it is, but for what no request line can hold."""
    return quote(text, safe="/%:\\.", errors="surrogatepass")


def whole(text: str) -> str:
    """Every byte quoted."""
    return "".join(f"%{b:02x}" for b in text.encode(errors="surrogatepass"))


def twice(text: str) -> str:
    return whole(text).replace("%", "%25")


def ask(hub, token, method, path, body=None):
    """(status, bytes); the path goes out as it is."""
    link = http.client.HTTPConnection("127.0.0.1", hub.port, timeout=120)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    link.request(method, path, data, {"Authorization": f"Bearer {token}"})
    answer = link.getresponse()
    assert answer.headers["X-Evil"] is None
    found = answer.status, answer.read()
    link.close()
    return found


def everything(base):
    """Every name below, with what tells a change; logs and locks of the hub itself apart."""
    found = {}
    for folder, folders, files in os.walk(base):
        for name in (*folders, *files):
            state = os.lstat(os.path.join(folder, name))
            found[os.path.join(folder, name)] = (state.st_ino, state.st_size, state.st_mtime_ns)
    return found


def commit(rows):
    header = {"key": "header", "value": {"summary": "x"}}
    return "\n".join(json.dumps(row) for row in (header, *rows)).encode()


def by_file(quoted):
    """Routes that take a file's path in the URL."""
    yield "GET", f"/writer/model/resolve/main/{quoted}", None
    yield "HEAD", f"/writer/model/resolve/main/{quoted}", None
    yield "GET", f"/writer/model/raw/main/{quoted}", None
    yield "GET", f"/api/models/writer/model/tree/main/{quoted}", None


def by_branch(quoted):
    yield "GET", f"/writer/model/resolve/{quoted}/config.json", None
    yield "GET", f"/api/models/writer/model/tree/{quoted}", None
    yield "GET", f"/api/models/writer/model/revision/{quoted}", None
    yield "GET", f"/api/models/writer/model/commits/{quoted}", None
    yield "GET", f"/writer/model/tree/{quoted}", None
    yield "POST", f"/api/models/writer/model/paths-info/{quoted}", {"paths": ["a"]}
    yield "POST", f"/api/models/writer/model/preupload/{quoted}", {"files": []}
    yield "POST", f"/api/models/writer/model/branch/{quoted}", {}
    yield "DELETE", f"/api/models/writer/model/branch/{quoted}", None
    yield "POST", f"/api/models/writer/model/commit/{quoted}", commit([])


def by_repository(quoted):
    for name in (f"writer/{quoted}", f"{quoted}/model"):
        yield "GET", f"/api/models/{name}", None
        yield "GET", f"/api/models/{name}/refs", None
        yield "GET", f"/api/models/{name}/tree/main", None
        yield "GET", f"/{name}/resolve/main/config.json", None
        yield "PUT", f"/api/models/{name}/settings", {"private": True}
        yield "POST", f"/api/models/{name}/branch/new", {}
        yield "POST", f"/api/models/{name}/commit/main", commit([])
        yield "GET", f"/{name}.git/info/refs?service=git-upload-pack", None
        yield "POST", f"/{name}.git/git-upload-pack", b"0000"
        yield "POST", f"/{name}.git/info/lfs/objects/batch", {"operation": "upload", "objects": []}
        yield "POST", f"/{name}.git/info/lfs/verify", {"oid": OID, "size": 1}
        yield "GET", f"/{name}.git/info/lfs/objects/{OID}", None
        yield "PUT", f"/{name}.git/info/lfs/objects/{OID}?size=1", b"x"


def by_object(quoted):
    for method in ("GET", "HEAD", "PUT"):
        body = b"x" if method == "PUT" else None
        yield method, f"/writer/model.git/info/lfs/objects/{quoted}", body
        yield method, f"/writer/model.git/info/lfs/objects/{quoted}?size=1&deed=upload", body


def in_bodies(trick):
    """Routes that take a name in their body."""
    text = {"content": "e30=", "encoding": "base64"}
    model = "/api/models/writer/model"
    yield "POST", f"{model}/commit/main", commit([{"key": "file", "value": {"path": trick, **text}}])
    large = {"path": trick, "algo": "sha256", "oid": OID, "size": 1}
    yield "POST", f"{model}/commit/main", commit([{"key": "lfsFile", "value": large}])
    for oid in (trick, f"{trick}{OID}"[:64]):
        asked = {"operation": "upload", "objects": [{"oid": oid, "size": 1}]}
        yield "POST", "/writer/model.git/info/lfs/objects/batch", asked
        yield "POST", "/writer/model.git/info/lfs/verify", {"oid": oid, "size": 1}
    for key in ("deletedFile", "deletedFolder"):
        yield "POST", f"{model}/commit/main", commit([{"key": key, "value": {"path": trick}}])
    yield "POST", f"{model}/preupload/main", {"files": [{"path": trick, "size": 1}]}
    yield "POST", f"{model}/branch/new", {"startingPoint": trick}
    for owner, name in (("writer", trick), (trick, "model")):
        yield "POST", "/api/repos/create", {"organization": owner, "name": name}
        yield "DELETE", "/api/repos/delete", {"organization": owner, "name": name}


def refused(place, requests):
    """All answered with 4xx, with nothing of what lies outside, and nothing changed anywhere."""
    hub, token, base = place
    before = everything(base)
    for method, path, body in requests:
        status, answer = ask(hub, token, method, path, body)
        assert 400 <= status < 500, (method, path[:150], status, answer[:200])
        assert b"SECRET-OUTSIDE" not in answer
        assert b"root:" not in answer
    assert everything(base) == before


@pytest.mark.parametrize("kind", [by_file, by_branch, by_repository, by_object], ids=lambda k: k.__name__)
@pytest.mark.parametrize("trick", TRICKS.values(), ids=TRICKS)
def test_no_trick_in_a_url(place, trick, kind):
    refused(place, (r for quoting in (raw, whole, twice) for r in kind(quoting(trick))))


@pytest.mark.parametrize("trick", TRICKS.values(), ids=TRICKS)
def test_no_trick_in_a_body(place, trick):
    refused(place, in_bodies(trick))


def test_no_link_leads_out(place):
    hub, token, _ = place
    oid = f"ee{OID}"[:64]
    requests = [r for name in LINKS for r in by_repository(name) if "writer/evil" not in r[1]]
    requests = [r for r in requests if not r[1].startswith(("/linked/", "/api/models/linked/"))]
    upload = {"operation": "upload", "objects": [{"oid": oid, "size": 1}]}
    requests += [*by_branch("out"), *by_branch("away"), *by_branch("away%2fx")]
    requests += [("POST", "/writer/model.git/info/lfs/objects/batch", upload)]
    requests += [("POST", "/writer/model.git/info/lfs/verify", {"oid": oid, "size": 1})]
    requests += [("DELETE", "/api/repos/delete", {"organization": "writer", "name": "linked"})]
    refused(place, requests)
    status, answer = ask(hub, token, "GET", "/api/models")
    assert status == 200
    assert [m["id"] for m in json.loads(answer)] == ["writer/model"]
    assert b"SECRET" not in ask(hub, token, "GET", "/api/models/writer/model/refs")[1]
