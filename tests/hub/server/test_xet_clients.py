"""`hf upload` as it comes, with hf_xet and no variable set: large files by xet, cut, changed, and once more."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hub_folders import run
from quantmill.hub.server.repository import Repository
from quantmill.hub.server.xet import RAW

HF = Path(sys.executable).with_name("hf")
pytestmark = pytest.mark.skipif(not importlib.util.find_spec("hf_xet"), reason="hf_xet is not installed")


@pytest.fixture
def client(hub, tmp_path):
    """The environment of a client that was told nothing but the address."""
    return {k: v for k, v in hub.environment(tmp_path / "home").items() if k != "HF_HUB_DISABLE_XET"}


def repository(hub, name):
    return Repository(hub.root / "repos" / "me" / f"{name}.git")


def raw_xorbs(hub, name):
    return list(repository(hub, name).folder.glob(f"xet/??/*{RAW}"))


def upload(client, name, folder):
    done = run(HF, "upload", f"me/{name}", folder, env=client)
    assert done.returncode == 0, done.stderr


def assert_there(hub, name, folder):
    """Every file of a folder is on main, byte for byte, and what it came in is gone."""
    repo = repository(hub, name)
    entries = {e.path: e for e in repo.entries(repo.branches()["main"])}
    for path in folder.iterdir():
        pointer = entries[path.name].pointer
        assert repo.objects.path(pointer.oid).read_bytes() == path.read_bytes()
    assert not raw_xorbs(hub, name)


def floats(count):
    """Bytes that the client groups by four before it compresses them."""
    import numpy as np

    return np.random.default_rng(0).normal(size=count).astype(np.float32).tobytes()


def test_large_files_go_up_come_down_and_change(hub, client, tmp_path):
    folder = tmp_path / "up"
    folder.mkdir()
    (folder / "random.safetensors").write_bytes(os.urandom(98_000_000))
    (folder / "floats.safetensors").write_bytes(floats(10_000_000))
    (folder / "text.bin").write_bytes(b"the same line over and over\n" * 100_000)
    upload(client, "large", folder)
    assert_there(hub, "large", folder)
    got = run(HF, "download", "me/large", "--local-dir", tmp_path / "down", env=client)
    assert got.returncode == 0, got.stderr
    for path in folder.iterdir():
        assert (tmp_path / "down" / path.name).read_bytes() == path.read_bytes()
    commit = repository(hub, "large").branches()["main"]
    upload(client, "large", folder)
    assert repository(hub, "large").branches()["main"] == commit
    changed = bytearray((folder / "random.safetensors").read_bytes())
    changed[50_000_000:50_000_100] = b"x" * 100  # the client sends one chunk of it
    (folder / "random.safetensors").write_bytes(changed)
    upload(client, "large", folder)
    assert_there(hub, "large", folder)


def test_a_cut_upload_and_a_hub_that_forgot(hub, client, tmp_path):
    """The client believes that what it sent is there; where it is not, it learns that by another address."""
    folder = tmp_path / "up"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(os.urandom(98_000_000))
    words = [HF, "upload", "me/cut", folder]
    for cut in (signal.SIGKILL, signal.SIGINT):
        first = subprocess.Popen(words, env=client, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 60
        while first.poll() is None and time.monotonic() < until and not raw_xorbs(hub, "cut"):
            time.sleep(0.01)
        first.send_signal(cut)
        first.wait(240)
    upload(client, "cut", folder)
    repo = repository(hub, "cut")
    for lost in repo.folder.glob("xet/??/*"):
        lost.unlink()
    for lost in repo.objects.all():
        lost.unlink()
    (folder / "model.safetensors").rename(folder / "again.safetensors")
    failed = run(HF, "upload", "me/cut", folder / "again.safetensors", env=client)
    assert failed.returncode != 0
    upload(client, "cut", folder)
    assert_there(hub, "cut", folder)
