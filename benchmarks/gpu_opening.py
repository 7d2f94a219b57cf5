"""Seconds from the start of a process to a model's first token on the GPU, part by part, and the memory it takes.

    python benchmarks/gpu_opening.py FOLDER [--context 8192] [--rounds 3] [--early yes|no]

Every round is a process of its own, as `quantmill generate` is; the folder is in the page cache after the first.
The floor beside it: reading the folder's bytes once, by as many threads. Needs one NVIDIA GPU.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

THREADS, PIECE = 8, 4 << 20


def read_seconds(folder: Path) -> float:
    """Reading all weight files once, THREADS at a time."""
    pieces = [(f, at) for f in folder.glob("*.safetensors") for at in range(0, f.stat().st_size, PIECE)]

    def read(piece: tuple[Path, int]) -> int:
        with piece[0].open("rb", buffering=0) as stream:
            return len(os.pread(stream.fileno(), PIECE, piece[1]))

    begin = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool:
        total = sum(pool.map(read, pieces))
    assert total == sum(f.stat().st_size for f in folder.glob("*.safetensors")), "every byte was read"
    return time.perf_counter() - begin


def one_round(folder: Path, context: int, early: str | None) -> None:
    """Import, open, first token; then a long prompt, for the memory it leaves taken."""
    marks = [time.perf_counter()]
    import torch

    marks.append(time.perf_counter())
    from quantmill.runtime.gpu import weights
    from quantmill.runtime.gpu.decoder import GpuRuntime
    from quantmill.runtime.interface import PAGE, Piece

    weights.EARLY = weights.EARLY if early is None else early == "yes"
    marks.append(time.perf_counter())
    torch.zeros(1, device="cuda").item()
    marks.append(time.perf_counter())
    before = torch.cuda.mem_get_info()[0]
    runtime = GpuRuntime.from_folder(folder, context=context, kv_tokens=context)
    torch.cuda.synchronize()
    marks.append(time.perf_counter())
    runtime.forward([Piece([1], 0, (0,))]).argmax().item()
    marks.append(time.perf_counter())
    held = sum(f.stat().st_size for f in folder.iterdir())
    held += runtime.facts.pages * runtime.facts.bytes_per_page

    def over() -> str:
        return f"{(before - torch.cuda.mem_get_info()[0] - held) / 1e9:.2f}"

    parts = [b - a for a, b in pairwise(marks)]
    names = ("import torch", "import quantmill", "CUDA", "open", "first token")
    said = ", ".join(f"{name} {part:.2f}" for name, part in zip(names, parts, strict=True))
    first = over()
    runtime.forward([Piece([7] * 2048, 0, tuple(range(2048 // PAGE)))]).argmax().item()
    print(
        f"{said}: {marks[-1] - marks[0]:.2f} s, {sum(parts[3:]):.2f} s of it from opening on; memory over file and "
        f"cache {first} GB, {over()} after a prompt of 2048"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--early", choices=("yes", "no"), help="whether tensors are read ahead by threads")
    parser.add_argument("--round", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.round:
        one_round(asked.folder, asked.context, asked.early)
        return
    for _ in range(asked.rounds):
        command = [sys.executable, __file__, str(asked.folder), "--context", str(asked.context), "--round"]
        command += [] if asked.early is None else ["--early", asked.early]
        print(f"reading alone {read_seconds(asked.folder):.2f} s;", end=" ", flush=True)
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
