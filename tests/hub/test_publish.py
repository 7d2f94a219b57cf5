"""Publishing to a hub on loopback: complete branches, nothing sent twice, nothing damaged let through."""

import http.server
import shutil
import subprocess
import threading
from contextlib import contextmanager

import pytest

from hub_folders import OTHER
from quantmill import manifest
from quantmill.errors import BadCheckpoint, BadRequest, QuantmillError, SourceNotFound
from quantmill.hub import publish as module
from quantmill.hub.publish import publish, read_branches
from quantmill.hub.remote import list_files


def send(folder, name, api, **more):
    notes = []
    done = publish(read_branches(folder), name, api, **{"private": False, "notify": notes.append, **more})
    return {p.name: p for p in done}, notes


def test_every_branch_is_complete_and_main_comes_first(two_branches, online):
    done, _ = send(two_branches, "me/complete", online)
    assert list(done) == ["main", OTHER]
    for branch, published in done.items():
        remote = list_files(online, "me/complete", published.commit)
        local = {p.name for p in (two_branches / branch).iterdir()}
        assert remote.keys() == local | {".gitattributes", "SHA256SUMS"}
        assert remote["model.safetensors"].sha256 is not None
        assert remote["config.json"].sha256 is None


def test_the_sums_are_what_sha256sum_reads(two_branches, online, tmp_path):
    done, _ = send(two_branches, "me/sums", online)
    from huggingface_hub import snapshot_download

    folder = snapshot_download(
        "me/sums", revision=done[OTHER].commit, local_dir=tmp_path / "d", endpoint=online.endpoint
    )
    assert subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folder, capture_output=True).returncode == 0


def test_what_is_there_is_not_sent_again(two_branches, online, tmp_path):
    folder = shutil.copytree(two_branches, tmp_path / "two")
    first, _ = send(folder, "me/again", online)
    second, notes = send(folder, "me/again", online)
    assert [p.sent for p in second.values()] == [(), ()]
    assert [p.commit for p in second.values()] == [p.commit for p in first.values()]
    assert sorted(notes) == sorted(["main: unchanged", f"{OTHER}: unchanged"])

    (folder / OTHER / "README.md").write_text("another card")
    (folder / OTHER / "chat_template.jinja").unlink()
    third, _ = send(folder, "me/again", online)
    assert third["main"].sent == ()
    assert third[OTHER].sent == ("README.md", "SHA256SUMS")
    assert "chat_template.jinja" not in list_files(online, "me/again", third[OTHER].commit)


def test_a_new_branch_never_shows_the_files_of_main(two_branches, online):
    commit = online.create_commit

    def killed_at_the_second(*words, **more):
        if more["revision"] == OTHER:
            raise InterruptedError
        return commit(*words, **more)

    online.create_commit = killed_at_the_second
    with pytest.raises(InterruptedError):
        send(two_branches, "me/cut", online)
    assert list_files(online, "me/cut", OTHER).keys() == {".gitattributes"}
    online.create_commit = commit
    done, _ = send(two_branches, "me/cut", online)
    assert done["main"].sent == ()
    assert len(done[OTHER].sent) == 9


def test_a_damaged_folder_is_refused_before_anything_is_sent(two_branches, tmp_path):
    folder = shutil.copytree(two_branches, tmp_path / "two")
    (folder / OTHER / "tokenizer.json").unlink()
    with pytest.raises(BadCheckpoint, match=r"not fit.*quantmill check"):
        read_branches(folder)


def test_weights_that_are_not_what_their_manifest_says_are_refused(two_branches, online, tmp_path):
    folder = shutil.copytree(two_branches, tmp_path / "two")
    manifest.write_manifest(folder / OTHER)
    send(folder, "me/listed", online)
    path = folder / OTHER / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadCheckpoint, match="damaged or replaced"):
        send(folder, "me/damaged", online)
    assert not online.repo_exists("me/damaged")


def test_a_folder_without_a_card_is_refused(two_branches, tmp_path):
    folder = shutil.copytree(two_branches, tmp_path / "two")
    (folder / "main" / "README.md").unlink()
    with pytest.raises(BadCheckpoint, match="quantmill card"):
        read_branches(folder)


def test_private_is_never_made_public_by_mistake(two_branches, online):
    online.create_repo("me/open")
    with pytest.raises(BadRequest, match="is public"):
        send(two_branches, "me/open", online, private=True)


def test_a_hub_that_holds_something_else_is_found_out(two_branches, online, monkeypatch):
    monkeypatch.setattr(module, "list_files", lambda *_: {})
    with pytest.raises(QuantmillError, match="does not hold"):
        send(two_branches, "me/liar", online)


def test_no_hub_there_is_one_line(two_branches, online):
    from huggingface_hub import HfApi

    with pytest.raises(SourceNotFound, match="did not answer"):
        send(two_branches, "me/x", HfApi(endpoint="http://127.0.0.1:9"))


def test_sizes_come_first_and_every_byte_is_counted_once(two_branches, online, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    folder = shutil.copytree(two_branches, tmp_path / "two")
    for branch in ("main", OTHER):
        (folder / branch / "shared.bin").write_bytes(b"s" * 12_000_000)  # an object, sent by us
    seen = []

    @contextmanager
    def track(total):
        seen.append(total)
        yield seen.append

    _, notes = send(folder, "me/counted", online, track=track)
    total, *parts = seen
    unique = {p.read_bytes() for p in folder.glob("*/*") if p.name != manifest.NAME}
    assert total == sum(parts) == sum(map(len, unique))
    assert notes[-1].endswith("files that branches share travel once")
    assert any(n.startswith("main: sending") and n.endswith("MB") for n in notes)
    assert "it/s]" not in capsys.readouterr().err  # huggingface_hub's own bars
    _, notes = send(folder, "me/counted", online, track=track)
    assert seen[-1] == 0
    assert notes == ["main: unchanged", f"{OTHER}: unchanged"]


def test_a_hub_that_takes_both_gets_large_files_whole(two_branches, hub, online, tmp_path, monkeypatch):
    """By LFS a cut upload goes on at its byte, and no client has to cut files into chunks."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    folder = shutil.copytree(two_branches, tmp_path / "two")
    (folder / "main" / "large.bin").write_bytes(b"l" * 12_000_000)
    done, _ = send(folder, "me/both", online)
    assert list_files(online, "me/both", done["main"].commit)["large.bin"].size == 12_000_000
    assert [p.name for p in (hub.root / "repos" / "me" / "both.git" / "xet").iterdir()] == ["epoch"]


@pytest.mark.parametrize(
    ("status", "headers", "said"),
    [
        (429, {"Retry-After": "30"}, "no more requests from you for now .429 at me/x., for 30 s: wait"),
        (429, {}, "now .429 at me/x.: wait, then type the same again"),
        (503, {}, "in trouble .503 at me/x, no reason given.: type the same again in a few minutes"),
        (500, {"X-Error-Message": "disk"}, "in trouble .500 at me/x, disk"),
    ],
)
def test_a_hub_in_trouble_is_one_line(status, headers, said, two_branches, online):
    from huggingface_hub import HfApi

    class Troubled(http.server.BaseHTTPRequestHandler):
        def answer(self):
            self.send_response(status)
            for name, value in {**headers, "Content-Length": "0"}.items():
                self.send_header(name, value)
            self.end_headers()

        do_GET = do_POST = do_HEAD = answer

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Troubled) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            with pytest.raises(QuantmillError, match=said) as caught:
                send(two_branches, "me/x", HfApi(endpoint=f"http://127.0.0.1:{server.server_port}"))
        finally:
            server.shutdown()
    assert "\n" not in str(caught.value)
