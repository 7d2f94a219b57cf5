"""What the parser, the operating system and Ctrl-C make of a command: one line, and a status."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from quantmill import __version__, cli, sources
from quantmill.commands import hub as hub_command
from quantmill.commands import making, serving
from quantmill.console import Console
from quantmill.serve.settings import ServeSettings


def call(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `quantmill WORDS`."""
    sys.argv = ["quantmill", *map(str, words)]
    with pytest.raises(SystemExit) as end:
        cli.main()
    out = capsys.readouterr()
    return int(end.value.code or 0), out.out, out.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("planm",), "did you mean 'plan'"),
        (("plan", "x", "--grids", "card"), "--grid"),
        (("plan",), "missing argument 'source'"),
        (("plan", "x", "--seqlen", "long"), "--seqlen"),
        (("plan", "x", "--seqlen", "2"), "--seqlen"),
        (("quantize", "x"), "missing option '--out'"),
        (("eval", "x", "--contex", "9"), "--ctx"),
        (("eval", "x", "--dataset", "t.txt"), "--dataset (here it is called --text); type"),
        (("hub", "--root", "x", "--port", "70000"), "65535"),
        (("generate", "x", "y", "--prompt", "z"), "y"),
    ],
)
def test_the_parser_speaks_in_one_line(
    words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = call(capsys, *words)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("quantmill: ")
    assert said in err.lower()
    assert "--help" in err


def test_nothing_typed_shows_the_help_and_version_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, err = call(capsys)
    assert "quantize" in out + err
    assert call(capsys, "--version") == (0, f"{__version__}\n", "")


def raising(error: BaseException) -> Callable[..., Path]:
    def resolve(*_: object, **__: object) -> Path:
        raise error

    return resolve


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.ENOTDIR, errno.EMFILE])
def test_what_the_system_refuses_is_one_line(
    code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "resolve", raising(OSError(code, os.strerror(code), "some/place")))
    status, out, err = call(capsys, "plan", "x")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"quantmill: some/place: {os.strerror(code)}: ")
    for ours in (".x.0badcafe.partial", ".x.0badcafe.partial/model.safetensors"):
        monkeypatch.setattr(sources, "resolve", raising(OSError(code, "no", f"some/place/{ours}")))
        assert call(capsys, "plan", "x")[2].startswith("quantmill: some/place: no: ")


def test_what_nobody_can_mend_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "resolve", raising(OSError(errno.EIO, "Input/output error")))
    sys.argv = ["quantmill", "plan", "x"]
    with pytest.raises(OSError, match="Input/output"):
        cli.main()


@pytest.mark.parametrize(
    "words", [("plan", "x"), ("quantize", "x", "--out", "OUT"), ("demo", "--out", "OUT")]
)
def test_ctrl_c_ends_quietly(
    words: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from quantmill import demo

    for module in (sources, making):
        monkeypatch.setattr(module, "resolve", raising(KeyboardInterrupt()))
    monkeypatch.setattr(demo, "small_model", raising(KeyboardInterrupt()))
    status, _, err = call(capsys, *(str(tmp_path) if w == "OUT" else w for w in words))
    assert status == 130
    assert err.splitlines()[-1].startswith("quantmill: interrupted")
    assert ("--resume" in err) == (words[0] == "quantize")


@pytest.mark.parametrize(
    ("free", "said"), [(1000, "has room for 1.0 kB"), (10**12, "is no folder that you may write to")]
)
def test_a_run_that_cannot_be_written_does_not_begin(
    free: int,
    said: str,
    tiny_llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "out" if free == 1000 else tmp_path / "file" / "out"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    status, _, err = call(capsys, "quantize", tiny_llama, "--out", out, "--bits", "4", "--group-size", "32")
    assert status == 2
    assert said in err
    assert "calibrating" not in err
    assert not out.exists()


def test_chat_gives_what_was_said_as_a_document(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["/system be short", "hello", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    status, out, err = call(
        capsys, "chat", tiny_llama, "--max-new-tokens", "2", "--temperature", "0", "--json"
    )
    document = json.loads(out)
    assert status == 0
    assert document["system"] == "be short"
    assert [m["role"] for m in document["messages"]] == ["user", "assistant"]
    assert "> " in err


def test_servers_tell_their_address_as_a_document(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def at(*given: object, ready: Callable[[str], None] | None = None, **_: object) -> None:
        (ready or given[-1])("http://127.0.0.1:9")  # type: ignore[operator]

    monkeypatch.setattr(serving, "serve", at)
    monkeypatch.setattr(serving, "log_to_stderr", lambda: None)
    serving.serve_models((), ServeSettings(), Console(True), ui=False)
    assert json.loads(capsys.readouterr().out) == {"url": "http://127.0.0.1:9", "models": []}
    monkeypatch.setattr(hub_command, "serve", at)
    hub_command.serve_hub(tmp_path, "127.0.0.1", 9, Console(True))
    assert json.loads(capsys.readouterr().out) == {"root": str(tmp_path), "endpoint": "http://127.0.0.1:9"}
