"""Folders that appear whole or not at all, also when their writer is killed."""

import errno
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from quantmill.errors import BadCheckpoint, BadRequest
from quantmill.files import atomic_folder, cache_root, full_disk_said, read_json, write_json, write_text

WRITER = """
import sys, time
from pathlib import Path
from quantmill.files import atomic_folder
with atomic_folder(Path(sys.argv[1])) as folder:
    (folder / "config.json").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def fill(target: Path, text: str) -> None:
    with atomic_folder(target) as folder:
        (folder / "config.json").write_text(text)


def test_a_folder_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    with atomic_folder(target) as folder:
        assert folder.parent == target.parent
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("a")
        (folder / "link").symlink_to("sub/a")
        assert not target.exists()
    assert names(target) == ["link", "sub"]
    assert names(target.parent) == ["model"]
    assert stat.S_IMODE(target.stat().st_mode) == 0o777 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_an_error_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with pytest.raises(ZeroDivisionError), atomic_folder(target):
        raise ZeroDivisionError
    assert names(tmp_path) == []
    fill(target, "old")
    with pytest.raises(FileNotFoundError), atomic_folder(target) as folder:
        (folder / "nowhere" / "config.json").write_text("new")
    assert (target / "config.json").read_text() == "old"
    assert names(tmp_path) == ["model"]


def test_a_finished_folder_replaces_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "model"
    fill(target, "old")
    (target / "extra").write_text("gone with it")
    fill(target, "new")
    assert names(target) == ["config.json"]
    assert (target / "config.json").read_text() == "new"
    assert names(tmp_path) == ["model"]


def test_through_a_link_the_folder_behind_it_is_replaced(tmp_path: Path) -> None:
    fill(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    fill(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "config.json").read_text() == "new"


def test_other_peoples_things_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadRequest, match="is a file"), atomic_folder(tmp_path / "file"):
        pass
    (tmp_path / "photos").mkdir()
    fill(tmp_path / "photos", "an empty folder is free")
    (tmp_path / "photos" / "config.json").rename(tmp_path / "photos" / "summer.jpg")
    with pytest.raises(BadRequest, match="other things"), atomic_folder(tmp_path / "photos"):
        pass
    assert names(tmp_path / "photos") == ["summer.jpg"]


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    target = tmp_path / "model"
    fill(target, "old")
    (tmp_path / ".model.card.partial").mkdir()  # not one of ours: no token in its name
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(target)], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        fill(target, "meanwhile")  # a living writer's folder is left alone
        assert len(names(tmp_path)) == 3
        writer.send_signal(signal.SIGKILL)
    assert (target / "config.json").read_text() == "meanwhile"
    fill(target, "after")
    assert names(tmp_path) == [".model.card.partial", "model"]
    assert (target / "config.json").read_text() == "after"


def test_a_kill_between_the_two_renames_is_undone(tmp_path: Path) -> None:
    target = tmp_path / "model"
    fill(target, "old")
    target.rename(tmp_path / ".model.0123abcd.replaced")
    with pytest.raises(ZeroDivisionError), atomic_folder(target):
        raise ZeroDivisionError
    assert (target / "config.json").read_text() == "old"
    (tmp_path / ".model.0123abcd.replaced").mkdir()
    fill(target, "new")
    assert names(tmp_path) == ["model"]


def test_json_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": [1], "ü": "ß"})
    assert path.read_text(encoding="utf-8") == '{\n  "a": [\n    1\n  ],\n  "ü": "ß"\n}\n'
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text(encoding="utf-8"))["ü"] == "ß"
    write_text(path, "new")
    assert path.read_text() == "new"
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"{", "cannot be read"), (b"\xff\xfe", "cannot be read"), (b"[1]", "no JSON object")],
)
def test_json_that_is_none(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(BadCheckpoint, match=words):
        read_json(tmp_path / "a.json")
    with pytest.raises(BadCheckpoint, match=r"has no b\.json"):
        read_json(tmp_path / "b.json")


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QUANTMILL_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "quantmill"
    monkeypatch.setenv("QUANTMILL_HOME", str(tmp_path / "q"))
    assert cache_root() == tmp_path / "q"
    assert cache_root(tmp_path) == tmp_path


def test_importing_takes_no_torch() -> None:
    code = "import sys, quantmill.checkpoint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_full_disk_is_told_alike_by_every_library(tmp_path: Path) -> None:
    from safetensors import SafetensorError

    inner = [
        OSError("21624 requested and 16736 written"),  # numpy's tofile
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        OSError(errno.ENOSPC, "No space left on device"),  # a write to an open file
    ]
    for error in inner:
        with pytest.raises(OSError, match="No space left") as caught, full_disk_said(tmp_path / "x"):
            raise error
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "x"))
    with pytest.raises(OSError, match="No space left") as caught, atomic_folder(tmp_path / "folder"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "folder")
    with pytest.raises(SafetensorError, match="invalid"), full_disk_said(tmp_path / "x"):
        raise SafetensorError("invalid header")
