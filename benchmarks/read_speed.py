"""How fast GGUF and AWQ weights become the project's packed linears: GB of file read per second and core.

    python benchmarks/read_speed.py [--gb 0.5] [--folder DIR]

Writes a .gguf file of one type (Q4_0, Q4_1, Q8_0) and an AWQ file, of random codes in the shapes of Mistral-7B, and
reads every linear back: memory-mapped from the page cache, repacked to GPTQ's words and float16 scales, one
thread, median of five. Beside it in the same run the bound of this machine: copying the same bytes.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numba
import numpy as np
import torch

from quantmill.formats import awq, gguf
from quantmill.formats.container import write_file
from quantmill.formats.gguf_linear import split

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))  # (out, in)
RUNS = 5


def timed(work) -> float:
    work()  # compiled and in the page cache
    seconds = []
    for _ in range(RUNS):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def gguf_speed(kind: gguf.BlockType, folder: Path, size: float) -> tuple[float, float]:
    """(GB/s of reading, GB/s of copying)."""
    rng = np.random.default_rng(0)
    shapes, total = [], 0
    while total < size * 1e9:
        shapes.append(SHAPES[len(shapes) % len(SHAPES)])
        total += shapes[-1][0] * gguf.row_bytes(kind, shapes[-1][1])
    file = folder / f"{kind.name}.bin"
    rng.integers(0, 256, total, dtype=np.uint8).tofile(file)
    data = np.memmap(file, np.uint8, mode="r")

    def read() -> None:
        at = 0
        for outputs, inputs in shapes:
            nbytes = outputs * gguf.row_bytes(kind, inputs)
            split(kind, data[at : at + nbytes].reshape(outputs, -1))
            at += nbytes

    into = np.empty(total, np.uint8)
    return total / timed(read) / 1e9, total / timed(lambda: np.copyto(into, data)) / 1e9


def awq_speed(folder: Path, size: float) -> tuple[float, float]:
    from safetensors import safe_open

    generator = torch.Generator().manual_seed(0)
    tensors, total, number = {}, 0, 0
    while total < size * 1e9:
        outputs, inputs = SHAPES[number % len(SHAPES)]
        for suffix, rows in (("qweight", inputs), ("qzeros", inputs // 128)):
            words = torch.randint(-(2**31), 2**31 - 1, (rows, outputs // 8), generator=generator)
            tensors[f"{number}.{suffix}"] = words.int()
        tensors[f"{number}.scales"] = torch.rand(inputs // 128, outputs, generator=generator).half()
        total += sum(tensors[f"{number}.{s}"].nbytes for s in ("qweight", "qzeros", "scales"))
        number += 1
    write_file(folder / "awq.safetensors", tensors)
    opened = safe_open(folder / "awq.safetensors", framework="pt")

    def read() -> None:
        for i in range(number):
            parts = (opened.get_tensor(f"{i}.{s}") for s in ("qweight", "qzeros", "scales"))
            awq.to_packed(*parts, None)

    def copy() -> None:
        for name in tensors:
            opened.get_tensor(name).clone()

    return total / timed(read) / 1e9, total / timed(copy) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=0.5, help="size of each file")
    parser.add_argument("--folder", type=Path, help="where the files lie meanwhile")
    args = parser.parse_args()
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    print(f"{args.gb} GB each, one thread\n{'layout':<8}{'repacked, GB/s':>16}{'copied, GB/s':>14}")
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        for kind in ("Q4_0", "Q4_1", "Q8_0"):
            fast, bound = gguf_speed(gguf.TYPES[kind], Path(name), args.gb)
            print(f"{kind:<8}{fast:>16.2f}{bound:>14.2f}", flush=True)
        fast, bound = awq_speed(Path(name), args.gb)
        print(f"{'AWQ':<8}{fast:>16.2f}{bound:>14.2f}")


if __name__ == "__main__":
    main()
