"""Publish to and download from a hub in a box on loopback, against the disk's own copy rate in the same run.

    python benchmarks/hub_throughput.py [--megabytes 2000] [--rounds 3] [--work DIR]

Four branches with weights of their own and a tokenizer file in common. A round is a publish to a new repository,
the same again, and a download; before each of them the folder is copied (with fsync, as the hub has it) and the
copy removed, so that every step finds the disk and the memory as its copy did. Prints the medians of the rounds in
MB/s and of their shares of the copy rate; beside them what sha256 and loopback give on this machine, and the space
used against the unique bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

BRANCHES = (
    "main",
    "gptq-4bit-32g-actorder_True",
    "gptq-8bit-128g-actorder_True",
    "gptq-8bit-32g-actorder_True",
)
SHARED = 4_000_000  # bytes of the tokenizer file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=2000, help="of all four branches together")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--work", type=Path, help="a folder on the disk to measure; default: the temporary one"
    )
    chosen = parser.parse_args()
    print(f"sha256   {sha256_rate():6.0f} MB/s on one of {os.cpu_count()} cores; each end hashes every byte")
    print(f"loopback {loopback_rate():6.0f} MB/s, sendfile to recv, not kept")
    with tempfile.TemporaryDirectory(dir=chosen.work) as name:
        measure(Path(name), chosen.megabytes * 1_000_000, chosen.rounds)


def measure(work: Path, size: int, rounds: int) -> None:
    unique = write(work / "source", size)
    total = sum(p.stat().st_size for p in (work / "source").rglob("*") if p.is_file())
    process, url = serve(work / "root")
    found = []
    try:
        ready(url, work)
        for number in range(rounds):
            found.append(one_round(work, url, f"me/throughput{number}"))
            said = (
                f"{k} {total / s / 1e6:.0f} (copy {total / c / 1e6:.0f})" for k, (s, c) in found[-1].items()
            )
            print(f"round {number}, MB/s: {', '.join(said)}", flush=True)
            if number:
                shutil.rmtree(work / "root" / "repos" / "me" / f"throughput{number}.git")
    finally:
        process.terminate()
        process.wait(20)
    for what in found[0]:
        rate = statistics.median(total / f[what][0] / 1e6 for f in found)
        copy = statistics.median(total / f[what][1] / 1e6 for f in found)
        share = statistics.median(f[what][1] / f[what][0] for f in found)
        print(f"{what:14} {rate:6.0f} MB/s, a copy {copy:6.0f} MB/s: {share:5.2f} of the copy rate")
    stored = sum(p.stat().st_size for p in (work / "root").rglob("*") if p.is_file())
    print(f"stored {stored:,} bytes for {unique:,} unique ones: {stored / unique:.4f} times")


def one_round(work: Path, url: str, name: str) -> dict[str, tuple[float, float]]:
    """Seconds of each step, and of the copy before it."""
    steps: dict[str, Callable[[], None]] = {
        "publish": lambda: publish(work / "source", url, name),
        "publish again": lambda: publish(work / "source", url, name),
        "download": lambda: download(work / "got", url, name),
    }
    seconds = {}
    for what, step in steps.items():
        copy = timed(lambda: copy_tree(work / "source", work / "copy"))
        shutil.rmtree(work / "copy")
        os.sync()
        seconds[what] = timed(step), copy
    shutil.rmtree(work / "got")
    return seconds


def sha256_rate() -> float:
    """MB/s of one core, on data in its cache."""
    data, digest = bytes(1 << 18), hashlib.sha256()
    seconds = timed(lambda: [digest.update(data) for _ in range(2000)])
    return 2000 * len(data) / seconds / 1e6


def loopback_rate(size: int = 1 << 29) -> float:
    """MB/s through a socket of this machine."""
    ours, theirs = _pair()
    with ours, theirs, tempfile.TemporaryFile() as file:
        for _ in range(size >> 20):
            file.write(bytes(1 << 20))
        file.flush()
        sender = threading.Thread(target=lambda: theirs.sendfile(file, 0, size))
        buffer, left = bytearray(1 << 18), size
        began = time.perf_counter()
        sender.start()
        while left:
            left -= ours.recv_into(buffer, min(left, len(buffer)), socket.MSG_WAITALL)
        sender.join()
        return size / (time.perf_counter() - began) / 1e6


def _pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        return ours, listener.accept()[0]


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


def publish(source: Path, url: str, name: str) -> None:
    from huggingface_hub import HfApi

    from quantmill.hub.publish import Branch
    from quantmill.hub.publish import publish as send

    branches = [Branch(b, {p.name: p for p in (source / b).iterdir()}) for b in BRANCHES]
    api = HfApi(endpoint=url, library_name="quantmill")
    send(branches, name, api, private=False, notify=lambda _: None)


def download(target: Path, url: str, name: str) -> None:
    from huggingface_hub import HfApi

    from quantmill.hub.download import fetch, plan

    api = HfApi(endpoint=url)
    for branch in BRANCHES:
        fetch(plan(name, branch, api, None, target / branch), api, lambda _: None)


def timed(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
