"""Xorbs and shards, by hand: what is taken, what is refused, and what becomes of them."""

import hashlib
import http.client
import io
import json
import os
import random
import socket
import struct

import lz4.frame
import pytest

from quantmill.hub.server import shard, xet, xorb
from quantmill.hub.server.cas import ROUTES
from quantmill.hub.server.http import Incoming
from quantmill.hub.server.refusal import Refusal
from quantmill.hub.server.repository import create
from quantmill.hub.server.routing import find
from quantmill.hub.server.shard import Assembly, Segment
from quantmill.hub.server.store import FORGET, Store

CHUNK = 70_001  # bytes; no multiple of four


def head(scheme, packed, size, version=0):
    return (
        struct.pack("<B", version)
        + packed.to_bytes(3, "little")
        + bytes([scheme])
        + size.to_bytes(3, "little")
    )


def grouped(chunk):
    return b"".join(chunk[place::4] for place in range(4))


def packed(scheme, chunk):
    data = {0: chunk, 1: lz4.frame.compress(chunk), 2: lz4.frame.compress(grouped(chunk))}[scheme]
    return head(scheme, len(data), len(chunk)) + data


def chunks_of(seed, count):
    chance = random.Random(seed)
    return [chance.randbytes(chance.randrange(8192, CHUNK)) for _ in range(count)]


def raw_hash(text):
    return b"".join(struct.pack("<Q", int(text[i : i + 16], 16)) for i in range(0, 64, 16))


def shard_of(*assemblies, flags=shard.VERIFIED | shard.WITH_SHA256, version=shard.VERSION):
    found = [shard.TAG + struct.pack("<QQ", version, 0)]
    for item in assemblies:
        found.append(bytes(32) + struct.pack("<IIQ", flags, len(item.segments), 0))
        for s in item.segments:
            found.append(raw_hash(s.xorb) + struct.pack("<IIII", 0, s.size, s.first, s.last))
        found += [bytes(48)] * (len(item.segments) if flags & shard.VERIFIED else 0)
        found.append(raw_hash(item.sha256) + bytes(16))
    return b"".join([*found, shard.END, bytes(16)])


def name_of(number):
    return f"{number:064x}"


def assembly_of(data, *parts):
    """`parts`: xorb, its chunks, first, last."""
    segments = (Segment(x, first, last, sum(map(len, c[first:last]))) for x, c, first, last in parts)
    return Assembly(hashlib.sha256(data).hexdigest(), tuple(segments))


@pytest.fixture
def xorbs(tmp_path):
    found = xet.Xorbs.of(create(tmp_path / "r.git"))
    found.epoch()
    return found


def take(xorbs, number, chunks):
    assert xorbs.take(name_of(number), io.BytesIO(b"".join(packed(0, c) for c in chunks)))


@pytest.mark.parametrize("scheme", xorb.SCHEMES)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, CHUNK, xorb.LONGEST_CHUNK])
def test_a_chunk_of_every_scheme(scheme, size):
    chunk = (bytes(range(251)) * (size // 251 + 1))[:size]
    out = io.BytesIO()
    data = packed(scheme, chunk) + packed(0, b"end") + xorb.FOOTER + b"whatever follows"
    assert xorb.unpack(io.BytesIO(data), out) == [size, size + 3]
    assert out.getvalue() == chunk + b"end"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        xorb.FOOTER,
        head(0, 5, 5)[:6],
        head(0, 5, 5) + b"four",
        head(0, 5, 6) + b"fives",
        head(0, 5, 5, version=1) + b"fives",
        head(3, 5, 5) + b"fives",
        head(1, 5, 5) + b"fives",
        head(0, 0, 0),
        head(0, xorb.LONGEST_CHUNK + 1, xorb.LONGEST_CHUNK + 1) + bytes(xorb.LONGEST_CHUNK + 1),
        head(1, len(lz4.frame.compress(bytes(9_000_000))), 100) + lz4.frame.compress(bytes(9_000_000)),
        head(2, len(lz4.frame.compress(bytes(99))), 100) + lz4.frame.compress(bytes(99)),
        packed(0, b"x") * (xorb.MOST_CHUNKS + 1),
    ],
    ids=[
        *(
            "empty",
            "footer",
            "head",
            "cut",
            "size",
            "version",
            "scheme",
            "lz4",
            "zero",
            "long",
            "bomb",
            "short",
        ),
        "many",
    ],
)
def test_what_is_no_xorb_is_refused(xorbs, data):
    with pytest.raises(Refusal) as refusal:
        xorbs.take(name_of(1), io.BytesIO(data))
    assert refusal.value.status == 400
    assert not [p for p in xorbs.folder.rglob("*") if p.is_file() and p.name != xet.EPOCH]


def test_a_xorb_of_more_than_its_limit_unpacked():
    chunk = packed(1, bytes(xorb.LONGEST_CHUNK))
    with pytest.raises(Refusal, match="holds more than"):
        xorb.unpack(io.BytesIO(chunk * (xorb.LONGEST // xorb.LONGEST_CHUNK + 1)), io.BytesIO())


@pytest.mark.parametrize("flags", [shard.WITH_SHA256, shard.WITH_SHA256 | shard.VERIFIED])
def test_a_shard_as_it_was_written(flags):
    items = tuple(
        Assembly(name_of(9 + i), tuple(Segment(name_of(7 << 200 | j), j, j + 2, 5 * j + 1) for j in range(i)))
        for i in range(4)
    )
    assert shard.read_shard(shard_of(*items, flags=flags)) == items


@pytest.mark.parametrize(
    "data",
    [
        b"",
        shard_of()[:-48],
        shard_of(version=3),
        b"x" + shard_of()[1:],
        shard_of(assembly_of(b"", (name_of(1), [b"x"], 0, 1)))[:150],
        shard_of(assembly_of(b""), flags=0),
    ],
    ids=["empty", "end", "version", "tag", "cut", "sha256"],
)
def test_what_is_no_shard_is_refused(data):
    with pytest.raises(Refusal) as refusal:
        shard.read_shard(data)
    assert refusal.value.status == 400


def test_files_of_many_xorbs_and_chunks_that_were_sent_before(xorbs):
    one, two = chunks_of(1, 6), chunks_of(2, 5)
    take(xorbs, 1, one)
    take(xorbs, 2, two)
    assert not xorbs.take(name_of(1), io.BytesIO(b"not looked at"))
    first = b"".join([*one[2:5], *two, *one[:1]])
    parts = ((name_of(1), one, 2, 5), (name_of(2), two, 0, 5), (name_of(1), one, 0, 1))
    xorbs.assemble(assembly_of(first, *parts))
    oid = hashlib.sha256(first).hexdigest()
    assert xorbs.objects.path(oid).read_bytes() == first
    assert [p.name for p in xorbs.folder.rglob(f"*{xet.RAW}")] == [name_of(1) + xet.RAW]
    second = b"".join([*two[1:4], *one])  # out of the object, the xorb, and both in turn
    xorbs.assemble(assembly_of(second, (name_of(2), two, 1, 4), (name_of(1), one, 0, 6)))
    assert xorbs.objects.path(hashlib.sha256(second).hexdigest()).read_bytes() == second
    assert not list(xorbs.folder.rglob(f"*{xet.RAW}"))
    before = xorbs.objects.path(oid).stat()
    xorbs.assemble(assembly_of(first, *parts))
    third = b"".join([*one, *two])
    xorbs.assemble(assembly_of(third, (name_of(1), one, 0, 6), (name_of(2), two, 0, 5)))
    assert xorbs.objects.path(hashlib.sha256(third).hexdigest()).read_bytes() == third
    assert xorbs.objects.path(oid).read_bytes() == first
    assert xorbs.objects.path(oid).stat().st_size == before.st_size
    assert len(xorbs.objects.all()) == 3


def test_the_same_file_again_is_not_written_again(xorbs):
    chunks = chunks_of(3, 4)
    take(xorbs, 1, chunks)
    whole = assembly_of(b"".join(chunks), (name_of(1), chunks, 0, 2), (name_of(1), chunks, 2, 4))
    xorbs.assemble(whole)
    before = xorbs.objects.path(whole.sha256).stat()
    xorbs.assemble(whole)
    assert xorbs.objects.path(whole.sha256).stat().st_ino == before.st_ino


CHUNKS = chunks_of(4, 3)
WHOLE = b"".join(CHUNKS)


@pytest.mark.parametrize(
    "wrong",
    [
        assembly_of(b"other" + WHOLE, (name_of(1), CHUNKS, 0, 3)),
        assembly_of(WHOLE, (name_of(1), CHUNKS, 0, 2)),
        assembly_of(WHOLE, (name_of(2), CHUNKS, 0, 3)),
        assembly_of(WHOLE, (name_of(1), [*CHUNKS, b"x"], 0, 4)),
        assembly_of(WHOLE, (name_of(1), [*CHUNKS[:2], b"x"], 0, 3)),
        assembly_of(b"", (name_of(1), CHUNKS, 1, 1)),
    ],
    ids=["hash", "part", "xorb", "chunks", "size", "none"],
)
def test_a_file_that_is_another_gets_no_name_and_another_epoch(xorbs, wrong):
    take(xorbs, 1, CHUNKS)
    before = xorbs.epoch()
    with pytest.raises(Refusal) as refusal:
        xorbs.assemble(wrong)
    assert refusal.value.status == 400
    assert not xorbs.objects.all()
    assert xorbs.epoch() != before
    take(xorbs, 1, CHUNKS)  # nothing is taken for known any more
    xorbs.assemble(assembly_of(WHOLE, (name_of(1), CHUNKS, 0, 3)))


def test_old_xorbs_are_forgotten_and_collecting_forgets_all(tmp_path):
    store = Store.open(tmp_path / "root")
    store.create("me/m", store.accounts.who(None), private=False)
    found = xet.Xorbs.of(store.find("me/m", store.accounts.who(None)))
    first = found.epoch()
    take(found, 1, CHUNKS)
    with store.served():
        assert found.epoch() == first
    raw = next(found.folder.rglob(f"*{xet.RAW}"))
    os.utime(raw, (0, raw.stat().st_mtime - FORGET - 1))
    with store.served():
        second = found.epoch()
    assert second != first
    take(found, 1, CHUNKS)
    found.assemble(assembly_of(WHOLE, (name_of(1), CHUNKS, 0, 3)))
    removed, freed = store.collect()
    assert removed >= 3
    assert freed > len(WHOLE)
    assert not found.folder.exists()
    assert not found.objects.all()


def test_a_link_in_the_folder_leads_nowhere(xorbs, tmp_path):
    (tmp_path / "out").mkdir()
    (xorbs.folder / name_of(1)[:2]).symlink_to(tmp_path / "out")
    with pytest.raises(Refusal) as refusal:
        take(xorbs, 1, CHUNKS)
    assert refusal.value.status == 403
    assert not list((tmp_path / "out").iterdir())


def ask(hub, method, path, body=b"", token=""):
    link = http.client.HTTPConnection("127.0.0.1", hub.port, timeout=120)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    link.request(method, path, body, headers)
    answer = link.getresponse()
    text = answer.read()
    link.close()
    return answer.status, json.loads(text) if text.startswith(b"{") else {}


@pytest.fixture
def passes(hub, online):
    """The paths below which xorbs of two repositories go, and the passes for that."""
    found = []
    for name in ("me/xet1", "me/xet2"):
        online.create_repo(name, exist_ok=True)
        status, said = ask(hub, "GET", f"/api/models/{name}/xet-write-token/main")
        assert status == 200
        found.append((said["casUrl"].partition(str(hub.port))[2], said["accessToken"]))
    return found


def test_a_file_by_xet_over_http(hub, passes):
    (path, token), (other, _) = passes
    body = b"".join(packed(2, c) for c in CHUNKS)
    posted = f"{path}/v1/xorbs/default/{name_of(5)}"
    assert ask(hub, "POST", posted, body)[0] == 401
    assert ask(hub, "POST", posted, body, "1-2")[0] == 401
    assert ask(hub, "POST", posted.replace(path, other), body, token)[0] == 401
    assert ask(hub, "POST", posted, body, token) == (200, {"was_inserted": True})
    assert ask(hub, "POST", posted, body, token) == (200, {"was_inserted": False})
    assert ask(hub, "POST", f"{path}/v1/xorbs/default/..%2f..%2fx", body, token)[0] == 400
    described = shard_of(assembly_of(WHOLE, (name_of(5), CHUNKS, 0, 3)))
    assert ask(hub, "POST", f"{path}/v1/shards", described)[0] == 401
    assert ask(hub, "POST", f"{path}/v1/shards", described, token) == (200, {"result": 1})
    oid = hashlib.sha256(WHOLE).hexdigest()
    stored = hub.root / "repos" / "me" / "xet1.git" / "lfs" / oid[:2] / oid[2:4] / oid
    assert stored.read_bytes() == WHOLE
    status, said = ask(hub, "POST", f"{path}/v1/shards", described[:-48], token)
    assert (status, said["error"]) == (400, "the shard ends too early")
    for missing in (
        "/v2/shards",
        f"/v1/xorb-grants/default/{name_of(5)}",
        f"/v1/chunks/default/{name_of(1)}",
    ):
        assert ask(hub, "POST", path + missing, b"{}", token)[0] == 404
    assert ask(hub, "GET", "/api/models/me/xet1/xet-read-token/main")[0] == 404


def test_what_is_too_long_is_not_even_read():
    parts = ["api", "xet", "me", "m", "0", "v1", "xorbs", "default", name_of(1)]
    longest = find(ROUTES, "POST", parts)[0].longest
    assert xorb.LONGEST < longest < 2 * xorb.LONGEST
    ours, theirs = socket.socketpair()
    with ours, theirs, ours.makefile("rb") as stream, pytest.raises(Refusal) as refusal:
        Incoming(ours, stream, longest + 1).spooled(longest)
    assert refusal.value.status == 413


def test_a_pass_ends_with_its_epoch(hub, passes):
    path, token = passes[0]
    unknown = shard_of(assembly_of(WHOLE, (name_of(77), CHUNKS, 0, 3)))
    assert ask(hub, "POST", f"{path}/v1/shards", unknown, token)[0] == 400
    status, said = ask(hub, "POST", f"{path}/v1/shards", unknown, token)
    assert status == 404
    assert "send the files again" in said["error"]


def test_passes_need_a_token_that_may_write(tmp_path):
    import hub_folders

    store = Store.open(tmp_path / "root")
    reader, writer = store.accounts.add("reader", "read"), store.accounts.add("writer", "write")
    store.create("me/m", store.accounts.who(f"Bearer {writer}"), private=True)
    hub = hub_folders.Hub.start(tmp_path / "root")
    try:
        asked = "/api/models/me/m/xet-write-token/main"
        found = [ask(hub, "GET", asked, token=t)[0] for t in ("", reader, writer)]
        assert found == [401, 403, 200]
        said = ask(hub, "GET", asked, token=writer)[1]
        path = said["casUrl"].partition(str(hub.port))[2]
        body, posted = packed(0, b"x"), f"{path}/v1/xorbs/default/{name_of(1)}"
        assert ask(hub, "POST", posted, body, writer)[0] == 401  # a token is no pass
        assert ask(hub, "POST", posted, body, said["accessToken"])[0] == 200
        assert ask(hub, "GET", "/api/models/me/m", token=said["accessToken"])[0] == 401  # nor the reverse
    finally:
        hub.stop()
