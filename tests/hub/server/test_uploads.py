"""Large files into the hub: cut uploads that go on, writers at once, and clients that know no LFS."""

import hashlib
import http.client
import io
import os
import socket
import threading
import time

import pytest

from hub_folders import run
from quantmill.hub import upload, wire
from quantmill.hub.remote import Hashes, hash_file
from quantmill.hub.server import repository
from quantmill.hub.server.refusal import Refusal
from quantmill.hub.streams import Digest, pump
from quantmill.hub.upload import Meter, Uploads

SIZE = 3_000_000


@pytest.fixture
def blob(tmp_path, monkeypatch):
    """A file that counts as large here, and its hashes."""
    monkeypatch.setattr(upload, "LARGE", 1_000_000)
    path = tmp_path / "blob"
    path.write_bytes(os.urandom(SIZE))
    return path, hash_file(path)


@pytest.fixture
def model(online):
    online.create_repo("me/uploads", exist_ok=True)
    return online


def objects(hub):
    return repository.Repository(hub.root / "repos" / "me" / "uploads.git").objects


def wait_for(true):
    until = time.monotonic() + 120
    while not true() and time.monotonic() < until:
        time.sleep(0.02)
    assert true()


def cut(link, path, count):
    """Send the first bytes of a file, then hang up."""
    with wire.connection(link) as (connection, target):
        connection.putrequest("PUT", target)
        connection.putheader("Content-Length", str(path.stat().st_size))
        connection.putheader(upload.OFFSET, "0")
        connection.endheaders()
        connection.sock.sendall(path.read_bytes()[:count])


def test_a_cut_upload_goes_on_where_it_stopped(hub, model, blob):
    path, hashes = blob
    uploads = Uploads("me/uploads", model)
    link = uploads._link(hashes)
    cut(link, path, 1_700_000)
    wait_for(lambda: objects(hub).begun(hashes.sha256) == 1_700_000)
    assert upload._offset(link) == 1_700_000
    came = []
    assert Uploads("me/uploads", model, Meter(came.append)).send(path, hashes)
    assert came == [1_700_000, SIZE - 1_700_000]
    assert objects(hub).path(hashes.sha256).read_bytes() == path.read_bytes()
    assert objects(hub).begun(hashes.sha256) == 0
    assert uploads.send(path, hashes)  # it is there


def test_a_begun_upload_with_other_bytes_is_thrown_away(hub, model, blob):
    path, hashes = blob
    begun = objects(hub)._begun(hashes.sha256)
    begun.parent.mkdir(exist_ok=True)
    begun.write_bytes(b"x" * 1000)
    assert Uploads("me/uploads", model).send(path, hashes)
    assert objects(hub).path(hashes.sha256).read_bytes() == path.read_bytes()


def test_a_small_file_and_a_hub_behind_a_proxy_are_left_to_the_client(model, tmp_path, monkeypatch):
    path = tmp_path / "small"
    path.write_bytes(b"x")
    assert not Uploads("me/uploads", model).send(path, hash_file(path))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert not wire.is_direct("http://example.org/x")
    monkeypatch.setenv("no_proxy", "example.org")
    assert wire.is_direct("http://example.org/x")
    assert not wire.is_direct("https://example.org/x")


def test_the_same_object_from_two_writers_at_once(hub, model, blob):
    path, hashes = blob
    done = []
    threads = [
        threading.Thread(target=lambda: done.append(Uploads("me/uploads", model).send(path, hashes)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert any(done)
    assert objects(hub).path(hashes.sha256).read_bytes() == path.read_bytes()


def test_only_one_goes_on_with_an_object_and_only_where_it_stopped(tmp_path):
    repo = repository.create(tmp_path / "r.git")
    data = os.urandom(1000)
    oid = hashlib.sha256(data).hexdigest()
    with pytest.raises(Refusal) as refusal:
        repo.objects.resume(oid, 1000, 10)
    assert refusal.value.status == 409
    with repo.objects.resume(oid, 1000, 0) as first:
        with pytest.raises(Refusal) as refusal:
            repo.objects.resume(oid, 1000, 0)
        assert refusal.value.status == 409
        with pytest.raises(Refusal):
            first.take(io.BytesIO(data[:400]))
    assert repo.objects.begun(oid) == 400
    with repo.objects.resume(oid, 1000, 400) as second:
        second.take(io.BytesIO(data[400:]))
    assert repo.objects.path(oid).read_bytes() == data


def test_a_hash_follows_its_file_and_starts_again(tmp_path):
    data = os.urandom(5_000_000)
    with (tmp_path / "f").open("w+b", buffering=0) as file, Digest(file) as digest:
        assert pump(io.BytesIO(data), file, digest, 4_000_000, lambda _: None) == 4_000_000
        assert digest.hexdigest(4_000_000) == hashlib.sha256(data[:4_000_000]).hexdigest()
        digest.restart()
        file.seek(0)
        file.truncate()
        assert pump(io.BytesIO(data), file, digest, 9_000_000, lambda _: None) == len(data)
        assert digest.hexdigest(len(data)) == hashlib.sha256(data).hexdigest()


def test_a_hash_of_what_cannot_be_read_is_an_error(tmp_path):
    with (tmp_path / "f").open("wb", buffering=0) as file, Digest(file) as digest:  # for writing only
        file.write(b"x" * 10)
        with pytest.raises(OSError, match="cannot be read again"):
            digest.hexdigest(10)


@pytest.mark.parametrize(
    "head",
    [
        b"POST /api/repos/create HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        b"POST /api/repos/create HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n",
        b"POST /api/repos/create HTTP/1.1\r\nContent-Length: -5\r\n",
        b"POST /api/repos/create HTTP/1.1\r\nTransfer-Encoding: gzip\r\n",
    ],
    ids=["both", "two", "negative", "gzip"],
)
def test_a_body_of_unclear_length_is_refused(hub, head):
    with socket.create_connection(("127.0.0.1", hub.port), 20) as link:
        link.sendall(head + b"Host: 127.0.0.1\r\n\r\n0\r\n\r\n")
        answer = link.recv(65536)
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"Connection: close" in answer


def test_a_body_in_chunks(hub):
    link = http.client.HTTPConnection("127.0.0.1", hub.port, timeout=120)
    body = iter([b'{"name": "chunks", ', b'"organization": "me"}'])
    for status in (200, 409):
        link.request(
            "POST", "/api/repos/create", body, {"Content-Type": "application/json"}, encode_chunked=True
        )
        answer = link.getresponse()
        answer.read()
        assert answer.status == status or status == 409
        body = iter([b'{"name": "chunks", "organization": "me"}'])
    link.close()


def test_hf_upload_as_it_comes(hub, tmp_path):
    """The client chooses by itself how it sends what."""
    from pathlib import Path
    from sys import executable

    env = {k: v for k, v in hub.environment(tmp_path / "home").items() if k != "HF_HUB_DISABLE_XET"}
    folder = tmp_path / "up"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(os.urandom(12_000_000))
    (folder / "config.json").write_text("{}")
    done = run(Path(executable).with_name("hf"), "upload", "me/plain", folder, env=env)
    assert done.returncode == 0, done.stderr
    repo = repository.Repository(hub.root / "repos" / "me" / "plain.git")
    entries = {e.path: e for e in repo.entries(repo.branches()["main"])}
    expected = hash_file(folder / "model.safetensors")
    assert entries["model.safetensors"].pointer.oid == expected.sha256
    assert isinstance(expected, Hashes)
