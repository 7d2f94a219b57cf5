"""kill -9 at random moments, of hub, publisher and downloader: every branch whole, every repeated command well."""

import hashlib
import os
import random
import subprocess
import sys
import time

import pytest

import hub_folders
from quantmill.hub.publish import SUMS
from quantmill.hub.server.accounts import ANYBODY
from quantmill.hub.server.store import Store

NAME = "me/killed"
BRANCHES = ("main", "other")
COMMON = """
import sys
from pathlib import Path
from huggingface_hub import HfApi
from quantmill.hub import download
from quantmill.hub import upload
from quantmill.hub.publish import Branch, publish
upload.LARGE = 1_000_000  # so that cut uploads are gone on with
folder, url = Path(sys.argv[1]), sys.argv[2]
api = HfApi(endpoint=url)
print("ready", flush=True)
"""
PUBLISH = f"""{COMMON}
branches = [Branch(n, {{p.name: p for p in (folder / n).iterdir()}}) for n in {BRANCHES}]
publish(branches, "{NAME}", api, private=False, notify=lambda _: None)
"""
DOWNLOAD = f"""{COMMON}
for branch in {BRANCHES}:
    plan = download.plan("{NAME}", branch, api, None, folder / branch)
    download.fetch(plan, api, lambda _: None)
"""


def write_version(folder, version):
    """Two branches that share a file, with weights of their own that change with every version."""
    for branch in BRANCHES:
        (folder / branch).mkdir(parents=True, exist_ok=True)
        seed = random.Random(f"{branch} {version}")
        (folder / branch / "model.safetensors").write_bytes(seed.randbytes(2_000_000))
        (folder / branch / "tokenizer.model").write_bytes(b"shared" * 1000)
        (folder / branch / "config.json").write_text(f'{{"version": {version}}}')


def start(code, folder, hub, home):
    words = [sys.executable, "-c", code, str(folder), hub.url]
    env = dict(hub.environment(home))
    client = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert client.stdout is not None
    assert client.stdout.readline() == "ready\n"
    return client


def end(client, kill=False):
    if kill:
        client.kill()
    code = client.wait(60)
    client.stdout.close()
    return code


def assert_whole(root):
    """Every branch is empty, or holds exactly what its list of sums says, with those hashes."""
    store = Store.open(root)
    if NAME not in store.list():
        return
    repo = store.find(NAME, ANYBODY)
    for commit in repo.branches().values():
        entries = {e.path: e for e in repo.entries(commit) if e.path != ".gitattributes"}
        if not entries:
            continue
        sums = repo.read(entries.pop(SUMS).blob).as_raw_string().decode()
        listed = {line[66:]: line[:64] for line in sums.splitlines()}
        assert listed.keys() == entries.keys()
        for path, entry in entries.items():
            file = repo.objects.path(entry.pointer.oid) if entry.pointer else None
            data = file.read_bytes() if file else repo.read(entry.blob).as_raw_string()
            assert hashlib.sha256(data).hexdigest() == listed[path]


def assert_no_half_model(folder):
    """What has its own name at the reader's is the whole file."""
    for weights in folder.rglob("model.safetensors"):
        assert weights.stat().st_size == 2_000_000


def kill_rounds(tmp_path, rounds, seed):
    chance = random.Random(seed)
    source, home, root = tmp_path / "source", tmp_path / "home", tmp_path / "hub" / "root"
    hub = hub_folders.Hub.start(root)
    for number in range(rounds):
        write_version(source, number)
        code, folder = chance.choice(((PUBLISH, source), (PUBLISH, source), (DOWNLOAD, tmp_path / "got")))
        client = start(code, folder, hub, home)
        time.sleep(chance.random() * 0.4)
        if chance.random() < 0.5:
            hub.stop(kill=True)
            assert_whole(root)
            hub = hub_folders.Hub.start(root, hub.port)
            end(client, kill=chance.random() < 0.5)
        else:
            end(client, kill=True)
        assert_whole(root)
        assert_no_half_model(tmp_path / "got")
    assert end(start(PUBLISH, source, hub, home)) == 0
    assert end(start(DOWNLOAD, tmp_path / "got", hub, home)) == 0
    assert_whole(root)
    for path in source.rglob("*.*"):
        assert (tmp_path / "got" / path.relative_to(source)).read_bytes() == path.read_bytes()
    hub.stop()
    Store.open(root).collect()
    assert_whole(root)
    kept = sum(p.stat().st_size for p in root.rglob("*") if p.is_file() and "lfs" in p.parts)
    history = rounds * 2 * 2_000_000 + 4_000_000 + 6_000
    assert kept <= history


def test_a_handful_of_kills(tmp_path):
    kill_rounds(tmp_path, 5, seed=7)


@pytest.mark.slow
def test_many_kills(tmp_path):
    kill_rounds(tmp_path, int(os.environ.get("QUANTMILL_KILLS", "15")), seed=11)
