"""Speed of the GPU's linears beside cuBLAS in fp16 and a plain read, all in one run. Needs one NVIDIA GPU.

    python benchmarks/gpu_linears.py [--tune] [--kinds 4,128 4,32 3,128 8,128 4,128,act 4,128,asym] [--rows 1 16]

Mistral-7B shapes, random weights. Every time is the median over replays of a CUDA graph of at least 20
launches that goes round copies of the weights which no cache holds. `--tune` measures cuts first and keeps them.
Prints, for every linear and number of rows, microseconds, GB/s of packed weights, their share of the read and
cuBLAS's microseconds; then the sums over 32 layers beside their targets and the time of reading the bytes, the
same layers one after the other in one graph, and the speed of repacking and of dense copies.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantmill.formats.gptq import dequantize
from quantmill.kernels.triton import tuning
from quantmill.kernels.triton.linear import RunnableLinear, dense_weight, has_wide, matmul
from quantmill.kernels.triton.packing import tile
from quantmill.kernels.triton.tune import BEYOND_CACHE, copies, microseconds, tune
from quantmill.types import CheckpointFormat, PackedLinear

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
TARGETS = {1: 1.30, 16: 1.45}  # ms over 32 layers, 4 bits in groups of 128
AT_MOST = 1.05  # of cuBLAS with a dense weight, for any number of rows
LAYERS = 32


@dataclass(frozen=True, slots=True)
class Kind:
    """What is in a file: `4,128,act,asym`."""

    bits: int
    group: int
    act_order: bool
    asym: bool

    @classmethod
    def read(cls, text: str) -> Kind:
        bits, group, *rest = text.split(",")
        return cls(int(bits), int(group), "act" in rest, "asym" in rest)


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


def path(first: RunnableLinear, rows: int) -> str:
    """What `matmul` does with so many rows."""
    t = first.tiled
    few = rows <= tuning.same_bits_up_to()
    cut = tuning.wide_cut(t, rows) if has_wide(t.words.device) and not few else None
    if cut is not None:
        return str(cut)
    return str(tuning.cut_for(t, rows)) if rows <= tuning.MOST_FEW else "dense copy"


def shape_rows(
    name: str, kind: Kind, asked: argparse.Namespace, read: float
) -> tuple[list[RunnableLinear], dict[int, tuple[float, float, float, float]]]:
    """Copies of the linear, and for every number of rows: microseconds, cuBLAS's, error, microseconds of a read."""
    n, k = SHAPES[name]
    packed = random_packed(n, k, kind.bits, kind.group, kind.act_order, not kind.asym)
    first = tile(packed)
    if asked.tune:
        begin = time.perf_counter()
        tune(first)
        entry = tuning.measured(first)
        print(f"tuned {tuning.key_of(first)} in {time.perf_counter() - begin:.0f} s: {json.dumps(entry)}")
    every = copies(first)
    dense = [dequantize(packed, torch.float16) for _ in range(-(-BEYOND_CACHE // (2 * n * k)) + 1)]
    found = {}
    floor = first.nbytes / read * 1e6
    for rows in asked.rows:
        x = torch.randn(rows, k, dtype=torch.float16, device="cuda")
        wrong = error(x, packed, matmul(x, every[0]))
        ours = microseconds([lambda e=e, x=x: matmul(x, e) for e in every])
        theirs = microseconds([lambda w=w, x=x: torch.nn.functional.linear(x, w) for w in dense])
        found[rows] = (ours, theirs, wrong, floor)
        print(
            f"{name:8} {rows:5} rows {ours:8.2f} us {first.nbytes / ours / 1e3:6.0f} GB/s {floor / ours:5.2f} of"
            f" the read   cuBLAS {theirs:8.2f} us, ours {ours / theirs:4.2f} of it   error {wrong:.1e}   "
            f"{path(every[0], rows)}",
            flush=True,
        )
    return every, found


def chain(layers: dict[str, list[RunnableLinear]], rows: int) -> float:
    """Milliseconds of 32 layers' linears, each launched behind the one before, in one graph."""
    inputs = {k: torch.randn(rows, k, dtype=torch.float16, device="cuda") for _, k in SHAPES.values()}

    def step() -> None:
        for layer in range(LAYERS):
            for every in layers.values():
                linear = every[layer % len(every)]
                matmul(inputs[linear.tiled.in_features], linear)

    return microseconds([step]) / 1e3


def repack_rate(packed: PackedLinear) -> float:
    """Bytes of packed weights a second, from the file's layout to ours, on the device."""
    tile(packed)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(5):
        tile(packed)
    torch.cuda.synchronize()
    return 5 * packed.qweight.numel() * 4 / (time.perf_counter() - begin)


def dense_rate(packed: PackedLinear) -> float:
    """Bytes a second that a dense copy reads and writes."""
    tiled = tile(packed)
    weight = dense_weight(tiled, torch.float16)
    us = microseconds([lambda: dense_weight(tiled, torch.float16, weight)])
    return (tiled.nbytes + weight.numel() * 2) / us * 1e6


def report(kind: Kind, asked: argparse.Namespace, read: float) -> dict[str, object]:
    """Measure one kind and print it."""
    order = "true" if kind.act_order else "no"
    print(f"{kind.bits} bits, group {kind.group}, {order} act order, {'a' * kind.asym}symmetric", flush=True)
    measured = {name: shape_rows(name, kind, asked, read) for name in asked.shapes}
    found = {name: rows for name, (_, rows) in measured.items()}
    print(f"sums over {LAYERS} layers, ms:")
    for rows in asked.rows:
        ours, theirs, floor = (LAYERS * sum(f[rows][i] for f in found.values()) / 1e3 for i in (0, 1, 3))
        target = (
            f"   target {TARGETS[rows]:.2f}"
            if rows in TARGETS and (kind.bits, kind.group) == (4, 128)
            else ""
        )
        behind = (
            chain({name: every for name, (every, _) in measured.items()}, rows)
            if rows <= 256
            else float("nan")
        )
        print(
            f"{rows:5} rows {ours:7.3f}, in one graph {behind:7.3f}   read {floor:6.3f}   cuBLAS {theirs:7.3f}   "
            f"ours {ours / theirs:4.2f} of it{'' if ours <= AT_MOST * theirs else f', asked {AT_MOST}'}{target}"
        )
    packed = random_packed(28672, 4096, kind.bits, kind.group, kind.act_order, not kind.asym)
    print(
        f"repacking {repack_rate(packed) / 1e9:.0f} GB/s of qweight, "
        f"dense copies {dense_rate(packed) / 1e9:.0f} GB/s"
    )
    return {"rows": found}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="+", default=["4,128"], metavar="BITS,GROUP[,act][,asym]")
    parser.add_argument(
        "--rows",
        type=int,
        nargs="+",
        default=[1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096],
    )
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        print("no NVIDIA GPU here: nothing to measure")
        return
    read = read_rate()
    print(f"{torch.cuda.get_device_name()}, plain read {read / 1e9:.0f} GB/s", flush=True)
    found = {text: report(Kind.read(text), asked, read) for text in asked.kinds}
    if asked.json:
        asked.json.write_text(json.dumps({"read": read, **found}))


if __name__ == "__main__":
    main()
