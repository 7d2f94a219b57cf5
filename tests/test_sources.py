"""What users type as SOURCE: folders, GGUF files, repositories; and what they are told where it is none."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from gguf_files import write_gguf
from quantmill import gguf_source
from quantmill.errors import BadCheckpoint, BadRequest, SourceNotFound, UnsupportedModel
from quantmill.sources import resolve, split_branch
from tiny_models import byte_level_tokenizer, tiny_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def model_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("owner/name", ("owner/name", None)),
        ("owner/name:main", ("owner/name", "main")),
        ("A-b/X-7B.v0.1-GPTQ:gptq-4bit-32g_True", ("A-b/X-7B.v0.1-GPTQ", "gptq-4bit-32g_True")),
        ("owner/name:refs/pr/3", ("owner/name", "refs/pr/3")),
        ("owner/name:", ("owner/name:", None)),
        ("models", ("models", None)),
        ("./models/x:y", ("./models/x:y", None)),
        ("/models/x:y", ("/models/x:y", None)),
        ("a/b/c:main", ("a/b/c:main", None)),
        (r"C:\models\x", (r"C:\models\x", None)),
        ("C:/models", ("C:/models", None)),
    ],
)
def test_split_branch(text: str, expected: tuple[str, str | None]):
    assert split_branch(text) == expected


def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = model_folder(tmp_path / "a" / "with:colon")
    assert resolve(str(folder)) == folder
    monkeypatch.chdir(tmp_path)
    assert resolve("a/with:colon") == Path("a/with:colon")  # what exists here is never looked for elsewhere
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/a/with:colon") == folder


def test_a_folder_of_branches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    main = model_folder(tmp_path / "out" / "model" / "main")
    model_folder(tmp_path / "out" / "model" / "gptq-4bit-32g-actorder_True")
    with pytest.raises(SourceNotFound, match=r"name one of .*gptq-4bit-32g-actorder_True, .*model/main"):
        resolve(str(main.parent))
    monkeypatch.chdir(tmp_path)
    assert resolve("out/model:main").resolve() == main
    with pytest.raises(SourceNotFound, match=r"no folder out/model/nope; name one of .*main"):
        resolve("out/model:nope")


def test_a_folder_beside_us_takes_a_branch_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    main = model_folder(tmp_path / "out" / "main")
    monkeypatch.chdir(tmp_path)
    assert resolve("out:main") == main.relative_to(tmp_path)
    assert resolve("./out:main") == main.relative_to(tmp_path)
    with pytest.raises(SourceNotFound, match="there is no folder out/other; name one of out/main"):
        resolve("out:other")


def test_a_misspelt_branch_is_told_with_those_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model_folder(tmp_path / "out" / "main")
    with pytest.raises(SourceNotFound, match=r"out/mian does not exist \(.*out holds main\)"):
        resolve(str(tmp_path / "out" / "mian"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        SourceNotFound, match=r"no folder out/mian here \(out holds main\), and the hub is out"
    ):
        resolve("out/mian")
    with pytest.raises(SourceNotFound, match=r"^mian does not exist; name"):
        resolve("mian")


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), byte_level_tokenizer())
    (tmp_path / "file").write_text("")
    with pytest.raises(
        BadRequest, match=r"file/sources cannot be made \(Not a directory\): set QUANTMILL_HOME"
    ):
        resolve(str(path), cache_dir=tmp_path / "file")


def test_a_folder_with_one_gguf_file_stands_for_it(tmp_path: Path):
    (tmp_path / "Q8_0").mkdir()
    write_gguf(tmp_path / "Q8_0" / "tiny.Q8_0.gguf", tiny_model("llama"), byte_level_tokenizer())
    assert (resolve(str(tmp_path / "Q8_0"), cache_dir=tmp_path / "cache") / "config.json").is_file()
    (tmp_path / "Q8_0" / "tiny.Q4_0.gguf").touch()
    with pytest.raises(SourceNotFound, match="name one of"):
        resolve(str(tmp_path / "Q8_0"), cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "it is empty"),
        (["a.bin", "b.txt"], r"but a\.bin, b\.txt"),
        (["x.gguf", "y.gguf"], r"name one of .*x\.gguf, .*y\.gguf"),
    ],
)
def test_a_folder_without_a_model_says_what_it_holds(tmp_path: Path, files: list[str], message: str):
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(SourceNotFound, match=message):
        resolve(str(tmp_path))


@pytest.mark.parametrize("source", ["nothing", "models/none.gguf", "/no/such/folder", r"C:\models\x", ""])
def test_what_does_not_exist(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceNotFound):
        resolve(source)


@pytest.mark.parametrize(
    ("name", "message"), [("model.bin", "is a file"), ("x-00001-of-00002.gguf", "llama-gguf-split --merge")]
)
def test_files_of_the_wrong_kind(tmp_path: Path, name: str, message: str):
    (tmp_path / name).touch()
    with pytest.raises(UnsupportedModel, match=message):
        resolve(str(tmp_path / name))


def test_gguf_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), byte_level_tokenizer())
    monkeypatch.setenv("QUANTMILL_HOME", str(tmp_path / "home"))
    said: list[str] = []
    folder = resolve(str(path), notify=said.append)
    assert folder.parent == tmp_path / "home" / "sources"
    assert folder.name.startswith("m-")
    assert {"config.json", "model.safetensors", "generation_config.json"} <= set(os.listdir(folder))
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= set(os.listdir(folder))
    assert said
    monkeypatch.setattr(gguf_source, "convert", lambda *_: pytest.fail("converted twice"))
    assert resolve(str(path)) == folder
    assert os.listdir(folder.parent) == [folder.name]


def test_the_cache_goes_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        gguf_source, "convert", lambda path, out, notify: (out / "config.json").write_text("{}")
    )
    monkeypatch.delenv("QUANTMILL_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    path = tmp_path / "m.gguf"
    path.write_bytes(b"one")
    first = resolve(str(path))
    assert first.parent == tmp_path / "xdg" / "quantmill" / "sources"
    path.write_bytes(b"two")
    assert resolve(str(path)) != first
    assert resolve(str(path), cache_dir=tmp_path / "own").parent == tmp_path / "own" / "sources"


def test_a_failed_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(path: Path, out: Path, notify: object) -> None:
        (out / "config.json").write_text("{}")
        raise BadCheckpoint("half way")

    monkeypatch.setattr(gguf_source, "convert", fail)
    (tmp_path / "m.gguf").touch()
    with pytest.raises(BadCheckpoint, match="half way"):
        resolve(str(tmp_path / "m.gguf"), cache_dir=tmp_path)
    assert list((tmp_path / "sources").iterdir()) == []


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty shared cache. The hub itself is out of reach (HF_HUB_OFFLINE, set in conftest.py)."""
    from huggingface_hub import constants

    assert constants.HF_HUB_OFFLINE
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    return cache


def fill(cache: Path, branch: str, commit: str, files: list[str]) -> Path:
    """One branch of acme/tiny laid out as huggingface_hub does."""
    repo = cache / "models--acme--tiny"
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir(exist_ok=True)
    for name in files:
        (repo / "blobs" / f"{commit[:8]}{name}").write_text("{}")
        (snapshot / name).symlink_to(repo / "blobs" / f"{commit[:8]}{name}")
    (repo / "refs").mkdir(exist_ok=True)
    (repo / "refs" / branch).write_text(commit)
    return snapshot


def test_a_repository_in_the_cache(hub_cache: Path):
    main = fill(hub_cache, "main", COMMIT, ["config.json", "model.safetensors"])
    other = fill(hub_cache, "gptq-8bit-32g-actorder_True", COMMIT[::-1], ["config.json", "model.safetensors"])
    assert resolve("acme/tiny") == main
    assert resolve("acme/tiny:main") == main
    assert resolve("acme/tiny:gptq-8bit-32g-actorder_True") == other


def test_an_unknown_branch_offline_names_those_in_the_cache(hub_cache: Path):
    fill(hub_cache, "main", COMMIT, ["config.json", "model.safetensors"])
    with pytest.raises(
        SourceNotFound, match=r"the cache holds main; when online: quantmill download acme/tiny:x$"
    ):
        resolve("acme/tiny:x")


@pytest.mark.parametrize("with_folder", [True, False])
def test_an_unknown_repository_offline(hub_cache: Path, with_folder: bool):
    if not with_folder:
        hub_cache.rmdir()
    with pytest.raises(
        SourceNotFound, match=r"no folder acme/none here, and the hub.*: quantmill download acme/none$"
    ):
        resolve("acme/none")


def test_a_repository_without_safetensors(hub_cache: Path):
    folder = fill(hub_cache, "main", COMMIT, ["config.json"])
    assert resolve("acme/tiny", files="config") == folder
    with pytest.raises(SourceNotFound, match=r"no \.safetensors file"):
        resolve("acme/tiny")


def test_a_repository_that_is_no_model(hub_cache: Path):
    fill(hub_cache, "main", COMMIT, ["README.md"])
    with pytest.raises(SourceNotFound, match=r"no config\.json"):
        resolve("acme/tiny")


def test_a_name_no_hub_would_take(hub_cache: Path):
    with pytest.raises(BadRequest, match="no repository name"):
        resolve("acme/a--b")


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does when it refuses; it has one repository, with one branch."""

    def do_GET(self) -> None:
        if self.path.endswith("/refs"):
            return self.answer(200, {"branches": [{"name": "main", "ref": "r", "targetCommit": COMMIT}]})
        code = {"acme/tiny": "RevisionNotFound", "acme/gated": "GatedRepo", "acme/ill": None}
        name = "/".join(self.path.split("/")[3:5])
        if name == "acme/ill":
            return self.answer(418, {})
        return self.answer(403 if name == "acme/gated" else 404, {}, code.get(name, "RepoNotFound"))

    do_HEAD = do_GET

    def answer(self, status: int, body: dict, error: str | None = None) -> None:
        payload = json.dumps({"tags": [], "converts": [], **body}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload)))
        self.send_header("Content-Type", "application/json")
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(payload)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def online(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub of our own on the loopback interface."""
    from huggingface_hub import constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("acme/tiny:nope", "acme/tiny has no branch 'nope'; it has main"),
        ("acme/none", r"no folder acme/none here, and there is no repository acme/none"),
        ("acme/gated", "acme/gated is gated"),
        ("acme/ill", "acme/ill"),
    ],
)
def test_what_the_hub_refuses(online: None, source: str, message: str):
    with pytest.raises(SourceNotFound, match=message):
        resolve(source)
