"""kill -9 at random moments, of hub, publisher, downloader, hf upload: every branch whole, every repeat well."""

import hashlib
import json
import os
import random
import select
import signal
import subprocess
import sys
import time

import pytest

import hub_folders
from quantmill.hub.publish import SUMS
from quantmill.hub.server.accounts import ANYBODY
from quantmill.hub.server.store import Store

NAME, BY_XET = "me/killed", "me/by-xet"
BRANCHES = ("main", "other")
CLIENTS = f"""
import os, sys
from pathlib import Path
import hf_xet
from huggingface_hub import HfApi
from quantmill.hub import download, upload
from quantmill.hub.publish import Branch, publish
upload.LARGE = 1_000_000  # so that cut uploads are gone on with
api = HfApi(endpoint=sys.argv[1])

def publish_all(folder):
    branches = [Branch(n, {{p.name: p for p in (folder / n).iterdir()}}) for n in {BRANCHES}]
    publish(branches, "{NAME}", api, private=False, notify=lambda _: None)

def download_all(folder):
    for branch in {BRANCHES}:
        plan = download.plan("{NAME}", branch, api, None, folder / branch)
        download.fetch(plan, api, lambda _: None)

def upload_one(folder):
    api.create_repo("{BY_XET}", exist_ok=True)
    api.upload_folder(repo_id="{BY_XET}", folder_path=folder / "main")

for line in iter(sys.stdin.readline, ""):
    deed, folder = line.rstrip().split(" ", 1)
    child = os.fork()
    if not child:
        try:
            globals()[deed](Path(folder))
            os._exit(0)
        finally:
            os._exit(1)
    print(child, flush=True)
    sys.stdin.readline()  # until then nobody else gets its number
    print(os.waitpid(child, 0)[1], flush=True)
"""
PUBLISH, DOWNLOAD, UPLOAD = "publish_all", "download_all", "upload_one"


def weights(branch, version):
    return random.Random(f"{branch} {version}").randbytes(2_000_000)


def write_version(folder, version):
    """Two branches that share a file, with weights of their own that change with every version."""
    for branch in BRANCHES:
        (folder / branch).mkdir(parents=True, exist_ok=True)
        (folder / branch / "model.safetensors").write_bytes(weights(branch, version))
        (folder / branch / "tokenizer.model").write_bytes(b"shared" * 1000)
        (folder / branch / "config.json").write_text(f'{{"version": {version}}}')


class Clients:
    """Clients, one after the other, each a process of its own: a fork of one that has imported everything."""

    def __init__(self, hub, home):
        env = {k: v for k, v in hub.environment(home).items() if k != "HF_HUB_DISABLE_XET"}
        words = [sys.executable, "-W", "ignore", "-c", CLIENTS, hub.url]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.parent = subprocess.Popen(words, env=env, text=True, **pipes)
        self.child = 0

    def start(self, deed, folder):
        print(deed, folder, file=self.parent.stdin, flush=True)
        self.child = int(self.parent.stdout.readline())

    def end(self, kill=False):
        """Whether it ended well by itself."""
        if kill:
            os.kill(self.child, signal.SIGKILL)
        print("wait", file=self.parent.stdin, flush=True)
        assert select.select([self.parent.stdout], [], [], 300)[0], "the client hangs"
        return self.parent.stdout.readline() == "0\n"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.parent.kill()
        self.parent.communicate()


def assert_whole(root):
    """Every branch is empty, or holds exactly what its list of sums says, with those hashes."""
    store = Store.open(root)
    assert_whole_by_xet(store)
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


def assert_whole_by_xet(store):
    """What huggingface_hub sent is nothing, or all of one version."""
    if BY_XET not in store.list():
        return
    repo = store.find(BY_XET, ANYBODY)
    entries = {e.path: e for e in repo.entries(repo.branches()["main"])}
    if "config.json" in entries:
        version = json.loads(repo.read(entries["config.json"].blob).as_raw_string())["version"]
        found = repo.objects.path(entries["model.safetensors"].pointer.oid).read_bytes()
        assert found == weights("main", version)


def assert_no_half_model(folder):
    """What has its own name at the reader's is the whole file."""
    for path in folder.rglob("model.safetensors"):
        assert path.stat().st_size == 2_000_000


def kill_rounds(tmp_path, rounds, seed):
    chance = random.Random(seed)
    source, got, root = tmp_path / "source", tmp_path / "got", tmp_path / "hub" / "root"
    deeds = ((PUBLISH, source), (PUBLISH, source), (UPLOAD, source), (DOWNLOAD, got))
    hub = hub_folders.Hub.start(root)
    with Clients(hub, tmp_path / "home") as clients:
        for number in range(rounds):
            write_version(source, number)
            clients.start(*chance.choice(deeds))
            time.sleep(chance.random() * 0.4)
            if chance.random() < 0.5:
                hub.stop(kill=True)
                assert_whole(root)
                hub = hub_folders.Hub.start(root, hub.port)
                clients.end(kill=chance.random() < 0.5)
            else:
                clients.end(kill=True)
            assert_whole(root)
            assert_no_half_model(got)
        for deed, folder in deeds[1:]:
            clients.start(deed, folder)
            assert clients.end(), deed
    assert_whole(root)
    for path in source.rglob("*.*"):
        assert (tmp_path / "got" / path.relative_to(source)).read_bytes() == path.read_bytes()
    hub.stop()
    Store.open(root).collect()
    assert_whole(root)
    kept = sum(p.stat().st_size for p in root.rglob("*") if p.is_file() and "lfs" in p.parts)
    history = rounds * 2 * 2_000_000 + 4_000_000 + 6_000 + 2_006_000
    assert kept <= history


def test_a_handful_of_kills(tmp_path):
    kill_rounds(tmp_path, 5, seed=7)


@pytest.mark.slow
def test_many_kills(tmp_path):
    kill_rounds(tmp_path, int(os.environ.get("QUANTMILL_KILLS", "15")), seed=11)
