"""Without a hub: what the cache holds is found, what it does not hold is said in one line; HF_HOME, HF_ENDPOINT."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from hub_folders import OTHER, run
from quantmill.commands.fetching import download
from quantmill.console import Console
from quantmill.errors import SourceNotFound
from quantmill.hub import download as fetching
from quantmill.hub.publish import publish, read_branches
from quantmill.hub.remote import fetch_papers
from quantmill.sources import resolve

ASKED = f"me/offline:{OTHER}"
QUANTMILL = (sys.executable, "-m", "quantmill.cli")


@pytest.fixture
def published(two_branches, online):
    publish(read_branches(two_branches), "me/offline", online, private=False, notify=lambda _: None)
    return online


@pytest.fixture
def unplugged(published, monkeypatch):
    """Call it to go offline: HF_HUB_OFFLINE=1, and nobody at the hub's address."""
    from huggingface_hub import constants

    def unplug():
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")

    return unplug


def same(folder: Path, other: Path) -> bool:
    return all((folder / p.name).read_bytes() == p.read_bytes() for p in other.iterdir())


def test_offline_with_the_model_in_the_cache(two_branches, published, unplugged):
    plan = fetching.plan("me/offline", OTHER, published, None, None)
    fetching.fetch(plan, published, lambda _: None)
    unplugged()
    done = download(ASKED, None, None, Console(mute=True))
    assert done["fetched_bytes"] == 0
    assert same(Path(done["folder"]), two_branches / OTHER)
    assert resolve(ASKED) == Path(done["folder"])
    with pytest.raises(SourceNotFound, match="does not hold all of me/offline"):
        download("me/offline", None, None, Console(mute=True))  # another branch of the same
    with pytest.raises(SourceNotFound, match=f"the cache holds {OTHER}"):
        resolve("me/offline")


def test_offline_without_it(unplugged):
    unplugged()
    with pytest.raises(SourceNotFound, match=r"HF_HUB_OFFLINE is set.*unset it"):
        download(ASKED, None, None, Console(mute=True))
    with pytest.raises(SourceNotFound, match="shared cache does not hold all of"):
        resolve(ASKED)


def test_a_machine_without_a_network(tmp_path, hub):
    nowhere = hub.environment(tmp_path, HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0")
    failed = run(*QUANTMILL, "plan", "owner/name:branch", env=nowhere)
    assert failed.returncode == 2
    assert failed.stderr.count("\n") == 1
    assert "the hub is out of reach" in failed.stderr


def test_offline_with_its_papers_only(published, unplugged):
    fetch_papers(ASKED)
    unplugged()
    with pytest.raises(SourceNotFound, match="does not hold all"):
        download(ASKED, None, None, Console(mute=True))
    with pytest.raises(SourceNotFound, match="shared cache does not hold all"):
        resolve(ASKED)


def test_offline_with_some_of_its_shards(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}'
    )
    (tmp_path / "1.safetensors").touch()
    assert fetching.lacking_weights(tmp_path) == "2.safetensors"
    (tmp_path / "2.safetensors").touch()
    assert fetching.lacking_weights(tmp_path) is None


def test_home_and_endpoint_come_from_the_environment(published, hub, two_branches, tmp_path):
    home, moved = tmp_path / "home", tmp_path / "elsewhere" / "hf"
    done = run(*QUANTMILL, "download", ASKED, env=hub.environment(home))  # HF_ENDPOINT, HF_HOME
    assert done.returncode == 0, done.stderr
    (snapshot,) = (home / "hub").glob("models--me--offline/snapshots/*")
    assert same(snapshot, two_branches / OTHER)
    moved.parent.mkdir()
    shutil.move(home, moved)
    nowhere = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = run(*QUANTMILL, "download", ASKED, env=hub.environment(moved, **nowhere))
    assert done.returncode == 0, done.stderr
    assert str(moved) in done.stdout
    words = ("generate", ASKED, "--prompt", "the cat", "--max-new-tokens", "2")
    done = run(*QUANTMILL, *words, env=hub.environment(moved, **nowhere))
    assert done.returncode == 0, done.stderr
    failed = run(*QUANTMILL, "download", ASKED, env=hub.environment(home, **nowhere))
    assert failed.returncode == 2
    assert failed.stderr.count("\n") == 1
    assert "HF_HUB_OFFLINE" in failed.stderr
    dead = run(*QUANTMILL, "download", ASKED, env=hub.environment(home, HF_ENDPOINT="http://127.0.0.1:9"))
    assert dead.returncode == 2
    assert "the hub did not answer" in dead.stderr
