"""The same command, source and seed give the same bytes, from one process to the next; and a manifest of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gptq_models import FAMILIES
from quantmill import manifest, portable
from quantmill.errors import BadCheckpoint
from tiny_models import byte_level_tokenizer, tiny_model

DIFFERS = ("quantize_report.json", manifest.NAME)  # how long it took


def quantize(source: Path, out: Path, *words: object) -> Path:
    """The command, in a process of its own. Returns the branch's folder."""
    command = [sys.executable, "-m", "quantmill.cli", "quantize", str(source), "--out", str(out)]
    done = subprocess.run(
        [*command, *map(str, words)], capture_output=True, text=True, check=False, timeout=3000
    )
    assert done.returncode == 0, done.stderr
    return next(p for p in out.iterdir() if (p / "config.json").is_file())


def made_twice(source: Path, folder: Path, *words: object) -> tuple[Path, Path]:
    first = quantize(source, folder / "first", *words)
    return first, quantize(source, folder / "second", *words)


def assert_same_bytes(first: Path, second: Path) -> None:
    ours, theirs = manifest.read_manifest(first), manifest.read_manifest(second)
    assert ours is not None
    assert theirs is not None
    assert ours.keys() == theirs.keys() == manifest.files_of(first).keys()
    assert {n for n in ours if ours[n] != theirs[n]} <= set(DIFFERS)
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[Path, Path]:
    """A model of a few thousand weights, and a text."""
    folder = tmp_path / "private" / "tiny"
    tiny_model("llama", **FAMILIES["llama"]).half().save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    text = tmp_path / "private" / "text.txt"
    text.write_text(
        "\n\n".join(f"Sentence number {i} of a text about nothing at all." * 4 for i in range(40))
    )
    return folder, text


def test_twice_the_same_bytes_and_nothing_private(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    source, text = tiny
    words = ("--bits", 4, "--group-size", 32, "--dataset", text, "--samples", 8, "--seqlen", 32, "--seed", 3)
    first, second = made_twice(source, tmp_path, *words)
    assert_same_bytes(first, second)
    sums = subprocess.run(["sha256sum", "-c", manifest.NAME], cwd=first, capture_output=True, check=False)
    assert sums.returncode == 0, sums.stderr
    for path in first.glob("*.json"):
        assert str(tmp_path) not in path.read_text(), path.name
    report = json.loads((first / "quantize_report.json").read_text())
    assert report["source"] == "tiny"
    assert "--dataset text.txt" in report["command"]


@pytest.mark.slow
@pytest.mark.model
def test_a_real_model_twice(smol_cut: Path, tmp_path: Path) -> None:
    words = ("--bits", 4, "--group-size", 64, "--dataset", "python-docs", "--samples", 4, "--seqlen", 128)
    assert_same_bytes(*made_twice(smol_cut, tmp_path, *words))


def test_a_manifest_lists_what_is_shown_and_follows_changes(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a", "sub/b", "empty", ".hidden"):
        (tmp_path / name).write_text("" if name == "empty" else name)
    manifest.update_manifest(tmp_path, ("a",))
    assert manifest.read_manifest(tmp_path) is None  # there is none to bring up to date
    manifest.write_manifest(tmp_path)
    sums = manifest.read_manifest(tmp_path)
    assert sums is not None
    assert sums.keys() == {"a", "sub/b", "empty"}
    (tmp_path / "a").write_text("other")
    (tmp_path / "empty").unlink()
    found = {n: manifest.sha256_of(p) for n, p in manifest.files_of(tmp_path).items()}
    assert manifest.differing(sums, found) == ("a", "empty")
    manifest.update_manifest(tmp_path, ("a", "empty"))
    assert manifest.differing(manifest.read_manifest(tmp_path) or {}, found) == ()
    (tmp_path / manifest.NAME).write_text("x")
    with pytest.raises(BadCheckpoint):
        manifest.read_manifest(tmp_path)


def test_names_that_may_leave_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert portable.public_source("owner/name:branch") == "owner/name:branch"
    assert portable.public_source("/home/me/models/x/") == "x"
    assert portable.public_source("~/models/x.gguf") == "x.gguf"
    monkeypatch.chdir(tmp_path)
    os.makedirs("models/x")
    assert portable.public_source("models/x") == "x"
    assert portable.public_source(".") == tmp_path.name
    shutil.rmtree("models")
    assert portable.public_source("models/x") == "models/x"
