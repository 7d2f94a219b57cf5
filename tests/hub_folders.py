"""Folders of branches that the doctor passes, and a hub to bring them to. A plain module beside the tests."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from gptq_models import write_quantized
from quantmill.types import QuantConfig
from tiny_models import byte_level_tokenizer, tiny_model

OTHER = "gptq-8bit-32g-actorder_True"
CONFIGS = {"main": QuantConfig(4, 128), OTHER: QuantConfig(8, 32)}


def branch_folder(folder: Path, config: QuantConfig, seed: int = 0) -> None:
    """A complete branch: weights, configs, tokenizer, card."""
    tokenizer = byte_level_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = tiny_model("llama", vocab_size=len(tokenizer), hidden_size=128, intermediate_size=128)
    write_quantized(folder, model, config)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(f"---\nlicense: mit\n---\n# Card <b>of</b> {folder.name}\n")


def repository_folder(folder: Path) -> Path:
    """Two branches."""
    for name, config in CONFIGS.items():
        branch_folder(folder / name, config)
    return folder


# The client library gives up after ten seconds; a busy test machine may take longer.
PATIENT = {"HF_HUB_ETAG_TIMEOUT": "120", "HF_HUB_DOWNLOAD_TIMEOUT": "120"}


@dataclass
class Hub:
    """`quantmill hub` in a process of its own, on loopback."""

    root: Path
    process: subprocess.Popen[str]
    url: str

    @classmethod
    def start(cls, root: Path, port: int = 0) -> Hub:
        words = ["hub", "--root", str(root), "--port", str(port)]
        process = subprocess.Popen(
            [sys.executable, "-m", "quantmill.cli", *words], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        line = process.stdout.readline()
        assert " at http://127.0.0.1:" in line, line
        hub = cls(root, process, line.rpartition(" at ")[2].strip())
        hub.wait()
        return hub

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def wait(self) -> None:
        """Until it answers, a minute at most."""
        import urllib.request

        for _ in range(600):
            try:
                urllib.request.urlopen(f"{self.url}/api/healthy", timeout=5).close()
                return
            except OSError:
                time.sleep(0.1)
        raise AssertionError("the hub does not answer")

    def stop(self, kill: bool = False) -> None:
        if kill:
            self.process.kill()
        else:
            self.process.terminate()
        self.process.wait(120)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def environment(self, home: Path, **more: str) -> Mapping[str, str]:
        """What a client needs to talk to this hub and no other."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        ours = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
        return {**kept, **ours, **quiet, "NO_COLOR": "1", "GIT_TERMINAL_PROMPT": "0", **PATIENT, **more}


def run(*words: object, env: Mapping[str, str], timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """A client, to its end."""
    return subprocess.run(
        [str(w) for w in words], env=dict(env), capture_output=True, text=True, timeout=timeout, check=False
    )
