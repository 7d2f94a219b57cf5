"""Downloading from a hub on loopback: whole or not at all, resumed, proved."""

import os

import pytest

from hub_folders import OTHER
from quantmill.errors import BadCheckpoint, BadRequest, QuantmillError, SourceNotFound
from quantmill.hub import download
from quantmill.hub.publish import publish, read_branches
from quantmill.hub.remote import RemoteFile


@pytest.fixture
def published(two_branches, online):
    publish(read_branches(two_branches), "me/two", online, private=False, notify=lambda _: None)
    return online


def get(api, branch=None, cache=None, local=None):
    plan = download.plan("me/two", branch, api, cache, local)
    came = []
    return download.fetch(plan, api, came.append), plan, sum(came)


def same(folder, other):
    return all((folder / p.name).read_bytes() == p.read_bytes() for p in other.iterdir())


def test_into_the_shared_cache_and_found_there_offline(published, two_branches, tmp_path, monkeypatch):
    from huggingface_hub import constants, snapshot_download

    folder, plan, came = get(published, OTHER, cache=tmp_path / "c")
    assert same(folder, two_branches / OTHER)
    assert came == plan.left == plan.size
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert snapshot_download("me/two", revision=OTHER, cache_dir=tmp_path / "c") == str(folder)


def test_into_a_folder_and_not_again(published, two_branches, tmp_path):
    folder, _, _ = get(published, local=tmp_path / "d")
    assert same(folder, two_branches / "main")
    _, plan, came = get(published, local=tmp_path / "d")
    assert plan.left == came == 0


def test_goes_on_where_it_stopped(published, two_branches, tmp_path):
    plan = download.plan("me/two", OTHER, published, tmp_path / "c", None)
    weights = plan.files["model.safetensors"]
    partial = plan.place.partial(weights)
    partial.parent.mkdir(parents=True)
    whole = (two_branches / OTHER / "model.safetensors").read_bytes()
    partial.write_bytes(whole[:100_000])
    folder, plan, came = get(published, OTHER, cache=tmp_path / "c")
    assert same(folder, two_branches / OTHER)
    assert plan.left == came == plan.size - 100_000


def test_a_partial_file_with_other_bytes_is_thrown_away(published, two_branches, tmp_path):
    plan = download.plan("me/two", OTHER, published, tmp_path / "c", None)
    partial = plan.place.partial(plan.files["model.safetensors"])
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"x" * 1000)
    with pytest.raises(QuantmillError, match="another hash"):
        get(published, OTHER, cache=tmp_path / "c")
    assert not list((tmp_path / "c").rglob("config.json"))
    folder, _, _ = get(published, OTHER, cache=tmp_path / "c")
    assert same(folder, two_branches / OTHER)


def test_damage_in_the_cache_is_found_and_mended(published, two_branches, tmp_path):
    folder, plan, _ = get(published, cache=tmp_path / "c")
    path = (folder / "model.safetensors").resolve()
    os.chmod(path, 0o644)
    path.write_bytes(b"\0" * plan.files["model.safetensors"].size)
    with pytest.raises(QuantmillError, match="damaged"):
        get(published, cache=tmp_path / "c")
    folder, _, _ = get(published, cache=tmp_path / "c")
    assert same(folder, two_branches / "main")


def test_a_full_disk_is_seen_before_anything_is_fetched(published, tmp_path, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(BadRequest, match="make room"):
        download.plan("me/two", None, published, tmp_path / "c", None)


def test_a_path_that_leaves_the_folder_is_refused(published, tmp_path, monkeypatch):
    from huggingface_hub.hf_api import RepoFile

    evil = RepoFile(path="../evil.json", size=3, oid="0" * 40)
    monkeypatch.setattr(published, "list_repo_tree", lambda *_, **__: [evil])
    with pytest.raises(BadCheckpoint, match="plain relative"):
        download.plan("me/two", None, published, tmp_path / "c", None)


def test_pickles_are_left_there(published, tmp_path):
    published.create_repo("me/pickled", exist_ok=True)
    published.upload_file(path_or_fileobj=b"x", path_in_repo="pytorch_model.bin", repo_id="me/pickled")
    plan = download.plan("me/pickled", None, published, tmp_path / "c", None)
    assert plan.files.keys() == {".gitattributes"}


@pytest.mark.parametrize(
    ("name", "branch", "said"),
    [
        ("me/two", "nope", "quantmill branches me/two$"),
        ("me/none", None, "no repository"),
        ("a b/c", None, "owner/name"),
    ],
)
def test_what_is_not_there_is_one_line(published, tmp_path, name, branch, said):
    with pytest.raises((SourceNotFound, BadRequest), match=said):
        download.plan(name, branch, published, tmp_path / "c", None)


def test_a_connection_that_breaks_is_followed_by_another(published, two_branches, tmp_path, monkeypatch):
    broken = iter([True, True])
    stream = download._stream

    def flaky(out, file: RemoteFile, *rest):
        if next(broken, False):
            raise ConnectionError("cut")
        stream(out, file, *rest)

    monkeypatch.setattr(download, "_stream", flaky)
    folder, _, _ = get(published, OTHER, cache=tmp_path / "c")
    assert same(folder, two_branches / OTHER)
