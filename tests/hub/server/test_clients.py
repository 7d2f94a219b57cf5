"""Clients as other people ship them, unchanged, against the hub on loopback."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from hub_folders import OTHER, run
from quantmill.hub.publish import publish, read_branches
from quantmill.hub.server.store import Store

HF = Path(sys.executable).with_name("hf")
OLD_CLI = Path(sys.executable).with_name("huggingface-cli")
LOAD = """
from transformers import AutoModelForCausalLM, AutoTokenizer
import quantmill.hf
quantmill.hf.register()
model = AutoModelForCausalLM.from_pretrained("me/clients", revision={branch!r})
tokenizer = AutoTokenizer.from_pretrained("me/clients", revision={branch!r})
print(model.config.quantization_config.bits, len(tokenizer))
"""


@pytest.fixture
def published(two_branches, online):
    publish(read_branches(two_branches), "me/clients", online, private=False, notify=lambda _: None)
    return two_branches


def same(folder, other):
    return all((folder / p.name).read_bytes() == p.read_bytes() for p in other.iterdir())


def test_hf_download(published, hub, tmp_path):
    env = hub.environment(tmp_path / "home")
    done = run(HF, "download", "me/clients", "--revision", OTHER, "--local-dir", tmp_path / "d", env=env)
    assert done.returncode == 0, done.stderr
    assert same(tmp_path / "d", published / OTHER)


def test_snapshot_download(published, online, tmp_path):
    from huggingface_hub import snapshot_download

    folder = snapshot_download("me/clients", revision=OTHER, cache_dir=tmp_path / "c")
    assert same(Path(folder), published / OTHER)


def test_hf_upload_and_again(hub, tmp_path):
    env = hub.environment(tmp_path / "home")
    folder = tmp_path / "up"
    (folder / "sub dir").mkdir(parents=True)
    (folder / "a.safetensors").write_bytes(bytes(range(256)) * 100)
    (folder / "sub dir" / "é x.json").write_text("{}")
    (folder / "empty.txt").touch()
    for _ in range(2):
        done = run(HF, "upload", "me/uploaded", folder, env=env)
        assert done.returncode == 0, done.stderr
    done = run(HF, "download", "me/uploaded", "--local-dir", tmp_path / "d", env=env)
    assert done.returncode == 0, done.stderr
    for path in folder.rglob("*.*"):
        assert (tmp_path / "d" / path.relative_to(folder)).read_bytes() == path.read_bytes()


def test_transformers_from_pretrained_by_revision(published, hub, tmp_path):
    code = LOAD.format(branch=OTHER)
    done = run(sys.executable, "-c", code, env=hub.environment(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "8"


@pytest.mark.skipif(not OLD_CLI.exists(), reason="this huggingface_hub has no huggingface-cli any more")
def test_the_older_command(published, hub, tmp_path):
    words = ("download", "me/clients", "--revision", OTHER, "--local-dir", tmp_path / "d")
    done = run(OLD_CLI, *words, env=hub.environment(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert same(tmp_path / "d", published / OTHER)


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_git_clone_of_one_branch(published, hub, tmp_path):
    env = hub.environment(tmp_path / "home", GIT_LFS_SKIP_SMUDGE="1", GIT_CONFIG_GLOBAL="/dev/null")
    words = ("git", "clone", "--single-branch", "--branch", OTHER, f"{hub.url}/me/clients", tmp_path / "d")
    done = run(*words, env=env)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "d" / "config.json").read_bytes() == (published / OTHER / "config.json").read_bytes()
    pointer = (tmp_path / "d" / "model.safetensors").read_text()
    assert pointer.startswith("version https://git-lfs.github.com/spec/v1\noid sha256:")


@pytest.mark.skipif(not shutil.which("git-lfs"), reason="git-lfs is not installed")
def test_git_clone_with_lfs(published, hub, tmp_path):
    env = hub.environment(tmp_path / "home", HOME=str(tmp_path))
    assert run("git", "lfs", "install", "--skip-repo", env=env).returncode == 0
    done = run("git", "clone", "--branch", OTHER, f"{hub.url}/me/clients.git", tmp_path / "d", env=env)
    assert done.returncode == 0, done.stderr
    assert same(tmp_path / "d", published / OTHER)


def test_resolve_takes_owner_name_and_branch(published, online, tmp_path):
    from quantmill.sources import resolve

    for asked, branch in ((f"me/clients:{OTHER}", OTHER), ("me/clients", "main")):
        for name in ("model.safetensors", "config.json", "tokenizer.json"):
            assert (resolve(asked) / name).read_bytes() == (published / branch / name).read_bytes()


def test_our_own_commands(published, hub, tmp_path):
    env = hub.environment(tmp_path / "home", HF_TOKEN="hf_secret_of_mine")
    quantmill = (sys.executable, "-m", "quantmill.cli")
    for words in (
        ("publish", published, "me/own", "--endpoint", hub.url, "--json"),
        ("branches", "me/own", "--json"),
        ("download", f"me/own:{OTHER}", "--local-dir", tmp_path / "d", "--json"),
    ):
        done = run(*quantmill, *words, env=env)
        assert done.returncode == 0, done.stderr
        assert "hf_secret" not in done.stdout + done.stderr
        assert done.stdout.startswith("{")
    assert same(tmp_path / "d", published / OTHER)


def test_tokens_and_garbage_by_command(hub, tmp_path):
    root = tmp_path / "root"
    quantmill = (sys.executable, "-m", "quantmill.cli", "hub", "--root", root)
    env = hub.environment(tmp_path / "home")
    made = run(*quantmill, "--add-token", "me", "--rights", "read", env=env)
    assert made.returncode == 0, made.stderr
    assert Store.open(root).accounts.who(f"Bearer {made.stdout.strip()}").rights == "read"
    done = run(*quantmill, "--collect", "--json", env=env)
    assert json.loads(done.stdout) == {"objects": 0, "freed_bytes": 0}
    busy = run(*quantmill[:-1], hub.root, "--collect", env=env)
    assert busy.returncode == 2
    assert "another hub" in busy.stderr
