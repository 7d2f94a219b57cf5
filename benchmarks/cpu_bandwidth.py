"""What share of the memory's bandwidth a decode step reaches with Mistral-7B's shapes and random weights.

    python benchmarks/cpu_bandwidth.py [--layers 8] [--threads 2] [--bits 4] [--group 128] [--mapped DIR]

The whole step is run, head included, on as many layers as asked for (32 is the model); beside it, in turn, a
plain streaming read with the same threads. --mapped writes the weights to a file in DIR and maps it, as a
real model's are.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantmill.files import write_json
from quantmill.kernels.cpu.bandwidth import streaming_read
from quantmill.kernels.cpu.layout import CpuLinear, Precision
from quantmill.kernels.cpu.packing import pack_rounded, pack_words, stack
from quantmill.kernels.cpu.pool import default_threads, shared_pool
from quantmill.runtime.cpu.runtime import CpuRuntime
from quantmill.runtime.cpu.settings import read_settings
from quantmill.runtime.cpu.store import ARRAYS, INDEX, Store, open_store, write_arrays
from quantmill.runtime.single import SingleSequence

CONFIG = {
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "sliding_window": 4096,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}


def random_linear(n: int, k: int, bits: int, group: int, rng: np.random.Generator) -> CpuLinear:
    words = rng.integers(-(2**31), 2**31, (k * bits // 32, n), dtype=np.int64).astype(np.int32)
    scales = (rng.random((n, k // group)) * 1e-3).astype(np.float16)
    zeros = np.full((n, k // group), 2 ** (bits - 1), np.uint8)
    return pack_words(words, scales, zeros, (np.arange(k) // group).astype(np.int32), bits)


def random_store(layers: int, bits: int, group: int) -> Store:
    rng = np.random.default_rng(0)
    linears: dict[str, CpuLinear] = {}
    arrays: dict[str, NDArray[Any]] = {"norm": np.ones(4096, np.float32)}
    for i in range(layers):
        inputs = stack([random_linear(n, 4096, bits, group, rng) for n in (4096, 1024, 1024)])
        assert inputs is not None
        linears[f"{i}.qkv"] = inputs
        for name, n, k in (
            ("o", 4096, 4096),
            ("gate", 14336, 4096),
            ("up", 14336, 4096),
            ("down", 4096, 14336),
        ):
            linears[f"{i}.{name}"] = random_linear(n, k, bits, group, rng)
        arrays |= {f"{i}.{norm}": np.ones(4096, np.float32) for norm in ("attention_norm", "mlp_norm")}
    arrays["embedding"] = rng.standard_normal((32000, 4096), np.float32).astype(np.float16)
    linears["head"] = pack_rounded(arrays["embedding"])
    return Store(linears, arrays)


def mapped(store: Store, folder: Path) -> Store:
    with (folder / ARRAYS).open("wb") as stream:
        index = write_arrays(stream, iter([*store.linears.items(), *store.arrays.items()]))
    write_json(folder / INDEX, index)
    return open_store(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--precision", choices=[p.name.lower() for p in Precision], default="int16")
    parser.add_argument("--mapped", type=Path)
    asked = parser.parse_args()
    store = random_store(asked.layers, asked.bits, asked.group)
    if asked.mapped:
        store = mapped(store, asked.mapped)
    settings = read_settings({**CONFIG, "num_hidden_layers": asked.layers})
    runtime = CpuRuntime(
        settings,
        store,
        threads=asked.threads,
        precision=Precision[asked.precision.upper()],
        context=1024,
        kv_tokens=1024,
    )
    sequence, nbytes = SingleSequence(runtime), runtime.facts.bytes_per_token
    sequence.read(list(range(1, 33)))
    steps, reads = [], []
    for token in range(asked.repeats):
        reads.append(streaming_read(shared_pool(asked.threads), repeats=1))
        begin = time.perf_counter()
        sequence.read([token])
        steps.append(nbytes / (time.perf_counter() - begin))
    pairs = [step / read for step, read in zip(steps, reads, strict=True)]
    size = f"{asked.layers} layers, {asked.bits} bits, {asked.threads} threads"
    size += f", {nbytes / 1e9:.2f} GB"
    step = f"step {median(steps) / 1e9:.1f} GB/s (best {max(steps) / 1e9:.1f})"
    read = f"read {median(reads) / 1e9:.1f} GB/s (best {max(reads) / 1e9:.1f})"
    print(f"{size} a token; {step}, {read}, share: median of pairs {median(pairs):.2f}")


if __name__ == "__main__":
    main()
