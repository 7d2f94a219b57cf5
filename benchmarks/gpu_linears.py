"""Speed of the GPU's linears beside cuBLAS in fp16 and a plain read, all in one run. Needs one NVIDIA GPU.

    python benchmarks/gpu_linears.py [--tune] [--bits 4] [--group 128] [--act-order] [--asym] [--rows 1 16]

Mistral-7B shapes, random weights. Every time is the median over replays of a CUDA graph of at least 24
launches that goes round copies of the weights which no cache holds. `--tune` measures cuts first and keeps them.
Prints, for every linear and number of rows, microseconds, GB/s of packed weights, their share of the read and
cuBLAS's microseconds; then the sums over 32 layers beside their targets, and the speed of repacking.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantmill.formats.gptq import dequantize
from quantmill.kernels.triton import tuning
from quantmill.kernels.triton.linear import matmul
from quantmill.kernels.triton.packing import tile
from quantmill.kernels.triton.tune import BEYOND_CACHE, copies, microseconds, tune
from quantmill.types import CheckpointFormat, PackedLinear

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
TARGETS = {1: 1.30, 16: 1.45}  # ms over 32 layers, 4 bits in groups of 128
LAYERS = 32


@triton.jit
def read_kernel(source, sink, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * 2 * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(source + at) ^ tl.load(source + at + BLOCK)
    tl.store(sink + tl.program_id(0), tl.sum(total, 0))


def read_rate() -> float:
    """Bytes a second of the fastest plain read of 4 GB."""
    words = torch.randint(-(2**31), 2**31 - 1, (1 << 30,), dtype=torch.int32, device="cuda")
    sink = torch.empty(1 << 20, dtype=torch.int32, device="cuda")
    times = [
        microseconds([lambda b=b, w=w: read_kernel[(len(words) // (2 * b),)](words, sink, b, num_warps=w)], 3)
        for b, w in ((4096, 4), (8192, 8), (4096, 8), (2048, 4))
    ]
    return words.numel() * 4 / min(times) * 1e6


def random_packed(n: int, k: int, bits: int, group: int, ordered: bool, sym: bool) -> PackedLinear:
    """Uniform codes (never zeros), scales of both signs for weights of about 0.02."""
    g = torch.Generator("cuda").manual_seed(n + k)
    groups = 1 if group == -1 else -(-k // group)
    low, high = -(2**31), 2**31 - 1
    words = torch.randint(low, high, (k * bits // 32, n), dtype=torch.int32, device="cuda", generator=g)
    scales = torch.rand(groups, n, device="cuda", generator=g) * 0.08 / 2**bits + 0.01 / 2**bits
    scales *= torch.where(torch.rand(groups, n, device="cuda", generator=g) < 0.5, -1.0, 1.0)
    zeros = torch.randint(low, high, (groups, n * bits // 32), dtype=torch.int32, device="cuda", generator=g)
    if sym:
        fields = sum(2 ** (bits - 1) << i * bits for i in range(32))
        one = [(fields >> 32 * w & 0xFFFFFFFF) - (1 << 32) * (fields >> 32 * w + 31 & 1) for w in range(bits)]
        zeros = torch.tensor(one, dtype=torch.int32, device="cuda").repeat(groups, n // 32)
    g_idx = torch.arange(k, device="cuda") // (k if group == -1 else group)
    if ordered:
        g_idx = g_idx[torch.randperm(k, device="cuda", generator=g)]
    return PackedLinear(
        words, zeros, scales.half(), g_idx.int(), None, bits, group, k, n, CheckpointFormat.GPTQ_V2
    )


def error(x: Tensor, packed: PackedLinear, y: Tensor) -> float:
    wanted = x.float() @ dequantize(packed, torch.float32).T
    return float((y.float() - wanted).norm() / wanted.norm())


def shape_rows(
    name: str, asked: argparse.Namespace, read: float
) -> dict[int, tuple[float, float, float, float]]:
    """For every number of rows: our microseconds, cuBLAS's, relative error, share of the read."""
    n, k = SHAPES[name]
    packed = random_packed(n, k, asked.bits, asked.group, asked.act_order, not asked.asym)
    first = tile(packed)
    if asked.tune:
        begin = time.perf_counter()
        tune(first)
        entry = tuning.measured(first)
        print(f"tuned {tuning.key_of(first)} in {time.perf_counter() - begin:.0f} s: {json.dumps(entry)}")
    every = copies(first)
    dense = [dequantize(packed, torch.float16) for _ in range(-(-BEYOND_CACHE // (2 * n * k)) + 1)]
    found = {}
    for rows in asked.rows:
        x = torch.randn(rows, k, dtype=torch.float16, device="cuda")
        ours = microseconds([lambda e=e, x=x: matmul(x, e) for e in every])
        theirs = microseconds([lambda w=w, x=x: torch.nn.functional.linear(x, w) for w in dense])
        wrong = error(x, packed, matmul(x, every[0]))
        share = first.nbytes / ours * 1e6 / read
        found[rows] = (ours, theirs, wrong, share)
        cut = tuning.cut_for(first, rows) if rows <= tuning.most_rows(first) else "dense copy"
        print(
            f"{name:8} {rows:5} rows {ours:8.2f} us {first.nbytes / ours / 1e3:6.0f} GB/s {share:5.2f} of the read"
            f"   cuBLAS {theirs:8.2f} us, ours {ours / theirs:4.2f} of it   error {wrong:.1e}   {cut}",
            flush=True,
        )
    return found


def repack_rate(packed: PackedLinear) -> float:
    """Bytes of packed weights a second, from the file's layout to ours, on the device."""
    tile(packed)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(5):
        tile(packed)
    torch.cuda.synchronize()
    return 5 * packed.qweight.numel() * 4 / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--act-order", action="store_true", help="true g_idx")
    parser.add_argument("--asym", action="store_true")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64, 256, 2048])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        print("no NVIDIA GPU here: nothing to measure")
        return
    read = read_rate()
    kind = f"{asked.bits} bits, group {asked.group}, {'true' if asked.act_order else 'no'} act order"
    print(f"{torch.cuda.get_device_name()}, plain read {read / 1e9:.0f} GB/s; {kind}", flush=True)
    found = {name: shape_rows(name, asked, read) for name in asked.shapes}
    print(f"sums over {LAYERS} layers, ms:")
    for rows in asked.rows:
        ours, theirs = (LAYERS * sum(f[rows][i] for f in found.values()) / 1e3 for i in (0, 1))
        target = f"   target {TARGETS[rows]:.2f}" if rows in TARGETS and asked.bits == 4 else ""
        print(f"{rows:5} rows {ours:7.3f}   cuBLAS {theirs:7.3f}   ours {ours / theirs:4.2f} of it{target}")
    packed = random_packed(28672, 4096, asked.bits, asked.group, asked.act_order, not asked.asym)
    print(f"repacking {repack_rate(packed) / 1e9:.0f} GB/s of qweight")
    if asked.json:
        asked.json.write_text(json.dumps({"read": read, "rows": found}))


if __name__ == "__main__":
    main()
