"""Speed of the CPU's linears beside a plain streaming read in the same run.

    python benchmarks/cpu_linears.py [--threads 2] [--precision int8] [--rows 1 8 64] [--isa avx2]

Mistral-7B shapes, random weights; several copies of a linear, so that none is found in a cache. Prints, for
every shape, bits and number of rows: time, GB/s of packed weights, share of the streaming read, billions of
multiply-adds per second, and the same of torch's fp32 product (oneDNN) where rows are many.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import numpy as np
from numpy.typing import NDArray

from quantmill.kernels.cpu.bandwidth import streaming_read
from quantmill.kernels.cpu.isa import choose
from quantmill.kernels.cpu.layout import CpuLinear, Precision
from quantmill.kernels.cpu.linear import RunnableLinear
from quantmill.kernels.cpu.packing import pack_words
from quantmill.kernels.cpu.pool import default_threads, shared_pool

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
BEYOND_CACHE = 96 << 20  # bytes of copies of one linear


def random_linear(n: int, k: int, bits: int, group: int, rng: np.random.Generator) -> CpuLinear:
    words = rng.integers(-(2**31), 2**31, (k * bits // 32, n), dtype=np.int64).astype(np.int32)
    scales = (rng.random((n, k // group)) * 0.01).astype(np.float16)
    zeros = np.full((n, k // group), 2 ** (bits - 1), np.uint8)
    return pack_words(words, scales, zeros, (np.arange(k) // group).astype(np.int32), bits)


def seconds(calls: list[Callable[[], object]], repeats: int) -> float:
    """Median time of a call, going round the list."""
    found = []
    for call in calls * repeats:
        begin = time.perf_counter()
        call()
        found.append(time.perf_counter() - begin)
    return median(found)


def onednn_rate(x: NDArray[np.float32], n: int, threads: int, dtype_name: str) -> float:
    import torch

    torch.set_num_threads(threads)
    dtype = getattr(torch, dtype_name)
    weight, inputs = torch.randn(n, x.shape[1]).to(dtype), torch.from_numpy(x).to(dtype)
    took = seconds([lambda: torch.nn.functional.linear(inputs, weight)], 4)
    return x.size * n / took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 8, 3, 2])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--isa")
    parser.add_argument("--precision", choices=[p.name.lower() for p in Precision], default="int16")
    parser.add_argument("--torch", action="store_true", help="compare with oneDNN where rows >= 16")
    asked = parser.parse_args()
    rng = np.random.default_rng(0)
    pool, precision = shared_pool(asked.threads), Precision[asked.precision.upper()]
    print(f"{choose(asked.isa).name}, {asked.threads} threads, group {asked.group}, {asked.precision}")
    for bits in asked.bits:
        for name in asked.shapes:
            n, k = SHAPES[name]
            first = random_linear(n, k, bits, asked.group, rng)
            linears = [first] + [
                random_linear(n, k, bits, asked.group, rng) for _ in range(BEYOND_CACHE // first.nbytes)
            ]
            runs = [
                RunnableLinear(lin, isa=asked.isa, precision=precision, threads=asked.threads)
                for lin in linears
            ]
            for rows in asked.rows:
                x = rng.standard_normal((rows, k)).astype(np.float32)
                read = streaming_read(pool)
                took = seconds([lambda run=run, x=x: run(x) for run in runs], max(1, 12 // len(runs)))
                rate = first.nbytes / took
                line = (
                    f"{bits} bits {name:8} {rows:4} rows {took * 1e3:8.2f} ms {rate / 1e9:6.1f} GB/s "
                    f"{rate / read:5.2f} of the read ({read / 1e9:.1f}) {rows * n * k / took / 1e9:7.1f} GMAC/s"
                )
                if asked.torch and rows >= 16:
                    for dtype in ("float32", "bfloat16"):
                        line += f"  {dtype} oneDNN {onednn_rate(x, n, asked.threads, dtype) / 1e9:.1f}"
                print(line, flush=True)


if __name__ == "__main__":
    main()
