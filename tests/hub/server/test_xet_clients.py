"""`hf upload` of what is too large for a commit, by clients that have hf_xet: what they say, and what cures it.

huggingface_hub (2.4: `_upload_pipeline.py`, `_commit_api._upload_files`) goes by xet whenever hf_xet is installed
and a file's mode is not "regular", whatever the hub answers; hf_xet shows the address that failed, no message.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from hub_folders import run

HF = Path(sys.executable).with_name("hf")
LARGE = 40_000_000  # bytes


@pytest.mark.skipif(not importlib.util.find_spec("hf_xet"), reason="hf_xet is not installed")
def test_a_large_file_by_xet_fails_with_the_cure_and_goes_by_lfs(hub, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(range(256)) * (LARGE // 256))
    env = dict(hub.environment(tmp_path / "home"))
    plain = {k: v for k, v in env.items() if k != "HF_HUB_DISABLE_XET"}
    failed = run(HF, "upload", "me/large", path, env=plain)
    assert failed.returncode != 0
    assert "/api/this-hub-has-no-xet/set/HF_HUB_DISABLE_XET=1" in failed.stdout + failed.stderr
    done = run(HF, "upload", "me/large", path, env=env)
    assert done.returncode == 0, done.stderr
    got = run(HF, "download", "me/large", "model.safetensors", "--local-dir", tmp_path / "d", env=env)
    assert got.returncode == 0, got.stderr
    assert (tmp_path / "d" / "model.safetensors").read_bytes() == path.read_bytes()
