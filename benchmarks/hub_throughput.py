"""Publish to and download from a hub in a box on loopback, against the disk's own copy rate in the same run.

    python benchmarks/hub_throughput.py [--megabytes 2000] [--work DIR]

Four branches with weights of their own and a tokenizer file in common. Prints rates in MB/s, their share of the
copy rate (with fsync, as the hub has it), and the space used against the unique bytes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

BRANCHES = (
    "main",
    "gptq-4bit-32g-actorder_True",
    "gptq-8bit-128g-actorder_True",
    "gptq-8bit-32g-actorder_True",
)
NAME = "me/throughput"
SHARED = 4_000_000  # bytes of the tokenizer file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=2000, help="of all four branches together")
    parser.add_argument(
        "--work", type=Path, help="a folder on the disk to measure; default: the temporary one"
    )
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.work) as name:
        measure(Path(name), chosen.megabytes * 1_000_000)


def measure(work: Path, size: int) -> None:
    unique = write(work / "source", size)
    total = sum(p.stat().st_size for p in (work / "source").rglob("*") if p.is_file())
    copy = timed(lambda: copy_tree(work / "source", work / "copy"))
    shutil.rmtree(work / "copy")
    report("disk copy", total, copy, copy)
    process, url = serve(work / "root")
    try:
        ready(url, work)
        report("publish", total, timed(lambda: publish(work / "source", url)), copy)
        report("publish again", total, timed(lambda: publish(work / "source", url)), copy)
        report("download", total, timed(lambda: download(work / "got", url)), copy)
    finally:
        process.terminate()
        process.wait(20)
    stored = sum(p.stat().st_size for p in (work / "root").rglob("*") if p.is_file())
    print(f"stored {stored:,} bytes for {unique:,} unique ones: {stored / unique:.4f} times")


def write(folder: Path, size: int) -> int:
    """Four branches. Returns their unique bytes."""
    each = size // len(BRANCHES) - SHARED
    for branch in BRANCHES:
        (folder / branch).mkdir(parents=True)
        with (folder / branch / "model.safetensors").open("wb") as stream:
            for begin in range(0, each, 1 << 22):
                stream.write(os.urandom(min(1 << 22, each - begin)))
        (folder / branch / "tokenizer.model").write_bytes(bytes(range(250)) * (SHARED // 250))
        (folder / branch / "README.md").write_text(branch)
    return each * len(BRANCHES) + SHARED + sum(map(len, BRANCHES))


def copy_tree(source: Path, target: Path) -> None:
    """A copy that is on the disk when it is done, as what the hub takes in is."""
    shutil.copytree(source, target)
    for path in target.rglob("*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def serve(root: Path) -> tuple[subprocess.Popen[str], str]:
    words = [sys.executable, "-m", "quantmill.cli", "hub", "--root", str(root), "--port", "0"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().rpartition(" at ")[2].strip()


def ready(url: str, work: Path) -> None:
    """Set huggingface_hub up for this hub before it is first imported."""
    os.environ |= {"HF_ENDPOINT": url, "HF_HOME": str(work / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    os.environ.pop("HF_HUB_OFFLINE", None)
    import huggingface_hub.hf_api  # noqa: F401  (not to be timed)

    import quantmill.hub.publish  # noqa: F401


def publish(source: Path, url: str) -> None:
    from huggingface_hub import HfApi

    from quantmill.hub.publish import Branch
    from quantmill.hub.publish import publish as send

    branches = [Branch(b, {p.name: p for p in (source / b).iterdir()}) for b in BRANCHES]
    send(branches, NAME, HfApi(endpoint=url), private=False, notify=lambda _: None)


def download(target: Path, url: str) -> None:
    from huggingface_hub import HfApi

    from quantmill.hub.download import fetch, plan

    api = HfApi(endpoint=url)
    for branch in BRANCHES:
        fetch(plan(NAME, branch, api, None, target / branch), api, lambda _: None)


def timed(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def report(what: str, size: int, seconds: float, copy: float) -> None:
    print(f"{what:14} {size / seconds / 1e6:8.0f} MB/s {copy / seconds:6.2f} of the copy rate", flush=True)


if __name__ == "__main__":
    main()
