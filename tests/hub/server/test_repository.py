"""Commits, branches, locks and the collection of garbage, without a network."""

import hashlib
import io
import shutil
import subprocess
import threading

import pytest

from quantmill.hub.server import repository
from quantmill.hub.server.accounts import ANYBODY
from quantmill.hub.server.lfs import Pointer, read_pointer
from quantmill.hub.server.refusal import Refusal
from quantmill.hub.server.repository import Change
from quantmill.hub.server.store import Store


@pytest.fixture
def repo(tmp_path):
    return repository.create(tmp_path / "r.git")


def store_object(repo, data):
    oid = hashlib.sha256(data).hexdigest()
    with repo.objects.receive(oid, len(data)) as receiving:
        receiving.take(io.BytesIO(data))
    return Pointer(oid, len(data))


def put(repo, branch, path, content=b"x"):
    return repo.commit(branch, [Change(path, content)], "message", "me")


def test_a_commit_is_whole_and_git_agrees(repo):
    pointer = store_object(repo, b"weights")
    changes = [
        Change("b/c/d.txt", b"1"),
        Change("b.txt", b"2"),
        Change("b/é.txt", b"3"),
        Change("w", pointer),
    ]
    commit = repo.commit("main", changes, "first", "me")
    entries = {e.path: e for e in repo.entries(commit)}
    assert entries.keys() == {"b/c/d.txt", "b.txt", "b/é.txt", "w"}
    assert (entries["w"].size, entries["w"].etag) == (7, pointer.oid)
    if shutil.which("git"):
        checked = subprocess.run(
            ["git", "-C", repo.folder, "fsck", "--full", "--strict"], capture_output=True
        )
        assert checked.returncode == 0, checked.stderr


def test_changes_and_deletions(repo):
    first = put(repo, "main", "a/x")
    assert put(repo, "main", "a/x") == first  # nothing changed, no commit
    repo.commit("main", [Change("a/y", b"y"), Change("b", b"b")], "more", "me")
    last = repo.commit("main", [Change("a", None, folder=True), Change("b", b"bb")], "less", "me")
    assert repo.blobs(last).keys() == {"b"}
    assert len(repo.history(last)) == 3


def test_a_branch_that_moved_is_not_overwritten(repo):
    seen = put(repo, "main", "a")
    put(repo, "main", "b")
    with pytest.raises(Refusal) as refusal:
        repo.commit("main", [Change("c", b"c")], "late", "me", parent=seen)
    assert refusal.value.status == 412


def test_branches_come_and_go(repo):
    first = put(repo, "main", "a")
    repo.create_branch("x/y", first)
    put(repo, "x/y", "b")
    assert repo.branches().keys() == {"main", "x/y"}
    for branch, status in (("x/y", 409), ("x", 409), ("main/z", 409)):
        with pytest.raises(Refusal) as refusal:
            repo.create_branch(branch, first)
        assert refusal.value.status == status
    repo.delete_branch("x/y")
    for act in (
        lambda: repo.delete_branch("main"),
        lambda: repo.resolve("x/y"),
        lambda: put(repo, "new", "a"),
    ):
        with pytest.raises(Refusal):
            act()


def test_a_file_is_not_also_a_folder(repo):
    put(repo, "main", "a")
    with pytest.raises(Refusal, match="both"):
        put(repo, "main", "a/b")


def test_writers_at_once_lose_nothing(repo):
    put(repo, "main", "start")
    names = [f"file{i}" for i in range(12)]
    threads = [threading.Thread(target=put, args=(repo, "main", n, n.encode())) for n in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    commit = repo.branches()["main"]
    assert repo.blobs(commit).keys() == {"start", *names}
    assert len(repo.history(commit)) == 13


def test_a_crash_before_the_branch_moves_leaves_the_old_commit(repo, monkeypatch):
    old = put(repo, "main", "a")

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(repo), "_move", die)
    with pytest.raises(KeyboardInterrupt):
        put(repo, "main", "b")
    monkeypatch.undo()
    assert repo.branches() == {"main": old}
    assert repo.collect()[0] == 2  # the tree and the commit that nobody points to; the blob is in use
    assert repo.blobs(put(repo, "main", "b")).keys() == {"a", "b"}


def test_garbage_goes_and_what_is_in_use_stays(repo):
    kept, lost = store_object(repo, b"kept"), store_object(repo, b"lost")
    repo.commit("main", [Change("k", kept)], "m", "me")
    repo.create_branch("b", repo.branches()["main"])
    repo.commit("b", [Change("l", lost)], "m", "me")
    assert repo.collect() == (0, 0)
    repo.delete_branch("b")
    assert repo.collect()[0] == 4
    assert repo.objects.size(kept.oid) == 4
    assert repo.objects.size(lost.oid) is None


def test_the_same_file_in_two_branches_is_stored_once(repo):
    pointer = store_object(repo, b"tokenizer" * 1000)
    repo.commit("main", [Change("t", pointer)], "m", "me")
    repo.create_branch("b", repo.branches()["main"])
    repo.commit("b", [Change("t2", pointer)], "m", "me")
    assert len(repo.objects.all()) == 1


def test_pointers():
    pointer = Pointer("ab" * 32, 12)
    assert read_pointer(pointer.text()) == pointer
    assert read_pointer(pointer.text() + b"x") is None
    assert read_pointer(b"version") is None


def test_repositories_appear_once_and_vanish(tmp_path):
    store = Store.open(tmp_path / "root")
    store.create("me/a", ANYBODY, private=False)
    with pytest.raises(Refusal) as refusal:
        store.create("me/a", ANYBODY, private=False)
    assert refusal.value.status == 409
    with pytest.raises(Refusal, match="tokens"):
        store.create("me/b", ANYBODY, private=True)
    assert store.list() == ["me/a"]
    store.delete("me/a", ANYBODY)
    assert store.list() == []
    assert not list((tmp_path / "root" / "repos" / "me").iterdir())
