"""What the hub refuses: path tricks, writing without the right, private things, broken uploads."""

import hashlib
import http.client
import json
import os

import pytest

import hub_folders
from quantmill.errors import BadRequest
from quantmill.hub.server.app import make_app
from quantmill.hub.server.store import Store

TRICKS = (
    "../evil",
    "..%2fevil",
    "%2e%2e/%2e%2e/evil",
    "/etc/passwd",
    "a/../../evil",
    "a\\..\\evil",
    "C:evil",
    ".git/config",
    "sub/.GIT/hooks/x",
    "a//b",
    "a/./b",
    "a\u202egnp.exe",
    "e\u0301",
    "\u200b",
    "nul\0",
    "line\nbreak",
    "x" * 256,
    "d/" * 40 + "f",
    "trailing.",
    " leading",
)
NAMES = ("..", ".", "a..b", ".hidden", "a/b", "a%2fb", "-x", "x.git", "x.lock", "é", "x" * 100, "a b", "")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A hub with a reader's and a writer's token. Gives (hub, reader, writer)."""
    root = tmp_path_factory.mktemp("guarded") / "root"
    accounts = Store.open(root).accounts
    reader, writer = accounts.add("reader", "read"), accounts.add("writer", "write")
    hub = hub_folders.Hub.start(root)
    yield hub, reader, writer
    hub.stop()


def ask(hub, method, path, body=None, token=None, **headers):
    """(status, headers, bytes) of one request, its path sent as it is."""
    connection = http.client.HTTPConnection("127.0.0.1", hub.port, timeout=120)
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    more = {"Authorization": f"Bearer {token}"} if token else {}
    connection.request(method, path, data, {**more, **headers})
    answer = connection.getresponse()
    found = answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
    connection.close()
    return found


def make(hub, token, name="writer/model", **more):
    owner, _, name = name.partition("/")
    return ask(hub, "POST", "/api/repos/create", {"organization": owner, "name": name, **more}, token)[0]


def commit(hub, token, path, content="e30=", branch="main"):
    rows = [
        {"key": "header", "value": {"summary": "x"}},
        {"key": "file", "value": {"path": path, "content": content, "encoding": "base64"}},
    ]
    body = "\n".join(map(json.dumps, rows)).encode()
    return ask(hub, "POST", f"/api/models/writer/model/commit/{branch}", body, token)[0]


def snapshot(root):
    return {p for p in root.parent.rglob("*") if "repos/writer" not in str(p)}


def test_no_trick_in_a_file_name_is_taken(guarded):
    hub, _, writer = guarded
    make(hub, writer)
    before = snapshot(hub.root)
    for trick in TRICKS:
        unquoted = trick.replace("%2f", "/").replace("%2e", ".")
        assert commit(hub, writer, unquoted) == 400, trick
    assert snapshot(hub.root) == before
    assert not list(hub.root.parent.rglob("*evil*"))


def test_no_trick_in_a_path_reaches_a_file(guarded):
    hub, _, writer = guarded
    make(hub, writer)
    for trick in (
        "../../../../tokens.json",
        "%2e%2e/%2e%2e/tokens.json",
        "..%2f..%2ftokens.json",
        "%00",
        "%ff",
    ):
        for kind in ("resolve/main", "raw/main", "resolve/..%2f..", "tree/main"):
            status, _, body = ask(hub, "GET", f"/writer/model/{kind}/{trick}", token=writer)
            assert status in (400, 404), (kind, trick)
            assert b"sha256" not in body
    for path in (
        "/../tokens.json",
        "/writer/../../tokens.json",
        "/writer/model.git/info/lfs/objects/../../x",
    ):
        assert ask(hub, "GET", path, token=writer)[0] in (400, 403, 404)


@pytest.mark.parametrize("name", NAMES)
def test_no_trick_in_a_repository_or_branch_name(guarded, name):
    hub, _, writer = guarded
    make(hub, writer)
    before = snapshot(hub.root)
    assert make(hub, writer, f"writer/{name}") == 400
    if name:
        assert make(hub, writer, f"{name}/model") == 400
    quoted = "".join(f"%{b:02x}" for b in name.encode())
    status = ask(hub, "POST", f"/api/models/writer/model/branch/{quoted}", {}, writer)[0]
    assert status in (200, 400, 404, 405)
    assert (status == 200) == (name in ("a/b", "x" * 100, "x.git")), name
    if status == 200:
        assert ask(hub, "DELETE", f"/api/models/writer/model/branch/{quoted}", token=writer)[0] == 200
    assert snapshot(hub.root) == before


def test_a_reader_writes_nothing(guarded):
    hub, reader, writer = guarded
    make(hub, writer)
    for token, status in ((reader, 403), (None, 401), ("hf_unknown", 401)):
        assert make(hub, token, "reader/own") == status
        assert commit(hub, token, "a.json") == status
        for method, path, body in (
            ("POST", "/api/models/writer/model/branch/b", {}),
            ("DELETE", "/api/models/writer/model/branch/main", None),
            ("PUT", "/api/models/writer/model/settings", {"visibility": "private"}),
            ("POST", "/api/models/writer/model/preupload/main", {"files": []}),
            ("POST", "/writer/model.git/info/lfs/objects/batch", {"operation": "upload", "objects": []}),
            ("DELETE", "/api/repos/delete", {"organization": "writer", "name": "model"}),
        ):
            assert ask(hub, method, path, body, token)[0] == status, (method, path)
    assert ask(hub, "POST", "/writer/model/git-receive-pack", b"", writer)[0] == 403


def test_a_private_repository_needs_a_token(guarded):
    hub, reader, writer = guarded
    assert make(hub, writer, "writer/secret", visibility="private") in (200, 409)
    paths = ("/api/models/writer/secret", "/writer/secret", "/writer/secret/resolve/main/.gitattributes")
    for path in (
        *paths,
        "/writer/secret/info/refs?service=git-upload-pack",
        "/api/models/writer/secret/refs",
    ):
        assert ask(hub, "GET", path)[0] == 401, path
        assert ask(hub, "GET", path, token=reader)[0] == 200, path
    assert ask(hub, "GET", "/api/models/writer/nothing")[:1] == (401,)  # names of private ones do not leak
    assert b"secret" not in ask(hub, "GET", "/")[2]
    assert b"secret" not in ask(hub, "GET", "/api/models")[2]


def test_an_object_must_be_what_its_name_says(guarded):
    hub, _, writer = guarded
    make(hub, writer)
    data = os.urandom(5000)
    oid = hashlib.sha256(data).hexdigest()
    asked = {"operation": "upload", "objects": [{"oid": oid, "size": len(data)}]}
    _, _, body = ask(hub, "POST", "/writer/model.git/info/lfs/objects/batch", asked, writer)
    link = json.loads(body)["objects"][0]["actions"]["upload"]["href"].removeprefix(hub.url)
    assert ask(hub, "PUT", link, b"x" * len(data))[0] == 422
    assert ask(hub, "PUT", link, data[:100])[0] == 422
    assert ask(hub, "PUT", link, data + b"x")[0] == 413
    assert ask(hub, "PUT", link.replace("seal=", "seal=0"), data)[0] == 403
    assert ask(hub, "GET", link)[0] == 403
    assert not list(hub.root.rglob(".incoming-*"))
    assert ask(hub, "PUT", link, data)[0] == 200
    batch = "/writer/model.git/info/lfs/objects/batch"
    assert "actions" not in json.loads(ask(hub, "POST", batch, asked, writer)[2])["objects"][0]


def test_a_commit_of_an_object_that_is_not_there_is_refused(guarded):
    hub, _, writer = guarded
    make(hub, writer)
    row = {"key": "lfsFile", "value": {"path": "m.safetensors", "oid": "0" * 64, "size": 3, "algo": "sha256"}}
    body = json.dumps(row).encode()
    assert ask(hub, "POST", "/api/models/writer/model/commit/main", body, writer)[0] == 400
    for odd in (b"{", b"[1]\n", b'{"key":"nope","value":{"path":"a"}}'):
        assert ask(hub, "POST", "/api/models/writer/model/commit/main", odd, writer)[0] == 400


def test_ranges_and_etags(guarded):
    hub, _, writer = guarded
    make(hub, writer)
    assert commit(hub, writer, "ten.txt", "MDEyMzQ1Njc4OQ==") == 200
    path = "/writer/model/resolve/main/ten.txt"
    status, headers, body = ask(hub, "GET", path)
    assert (status, body, headers["content-length"]) == (200, b"0123456789", "10")
    assert len(headers["x-repo-commit"]) == 40
    tag = headers["etag"]
    for asked, sent in (
        ("bytes=2-4", b"234"),
        ("bytes=7-", b"789"),
        ("bytes=-2", b"89"),
        ("bytes=8-99", b"89"),
    ):
        status, headers, body = ask(hub, "GET", path, Range=asked)
        assert (status, body) == (206, sent)
    assert headers["content-range"] == "bytes 8-9/10"
    assert ask(hub, "GET", path, Range="bytes=10-")[0] == 416
    assert ask(hub, "GET", path, **{"If-None-Match": tag})[0] == 304
    status, headers, body = ask(hub, "HEAD", path)
    assert (status, body, headers["content-length"]) == (200, b"", "10")


def test_no_web_page_speaks_for_its_reader(guarded):
    hub, _, writer = guarded
    make(hub, writer)
    path = "/api/models/writer/model/branch/b"
    assert ask(hub, "POST", path, {}, writer, Origin="http://evil.example")[0] == 403
    assert ask(hub, "GET", "/", Host="evil.example")[0] == 403


def test_a_card_is_text(guarded):
    hub, _, writer = guarded
    make(hub, writer)
    assert commit(hub, writer, "README.md", "PHNjcmlwdD5hPC9zY3JpcHQ+") == 200
    status, headers, body = ask(hub, "GET", "/writer/model")
    assert status == 200
    assert b"&lt;script&gt;" in body
    assert b"<script" not in body
    assert "default-src 'none'" in headers["content-security-policy"]


def test_an_open_root_is_for_loopback(tmp_path):
    store = Store.open(tmp_path / "root")
    with pytest.raises(BadRequest, match="--add-token"):
        make_app(store, "0.0.0.0")
    store.accounts.add("me", "write")
    make_app(store, "0.0.0.0")


def test_tokens_are_kept_as_hashes_that_others_cannot_read(tmp_path):
    store = Store.open(tmp_path / "root")
    token = store.accounts.add("me", "write")
    kept = tmp_path / "root" / "tokens.json"
    assert token not in kept.read_text()
    assert kept.stat().st_mode & 0o077 == 0


def test_one_server_per_root(tmp_path):
    store = Store.open(tmp_path / "root")
    with (
        store.served(),
        pytest.raises(BadRequest, match="another hub"),
        Store.open(tmp_path / "root").served(),
    ):
        pass
