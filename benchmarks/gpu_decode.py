"""Speed of the GPU decoder on a Mistral-7B-shaped model beside the floors of the same machine. Needs a GPU.

    python benchmarks/gpu_decode.py [--bits 4] [--group 128] [--act-order] [--quick] [--apart] [--json FILE]

Makes a GPTQ checkpoint with random codes (never zeros) in a temporary folder, opens it as `quantmill generate`
would, and prints tokens a second at several contexts and batch sizes, prompts of several lengths, what every
kernel takes, and bytes a token, beside: the rate of a plain read, and a chain of read-only launches of the same
bytes in one CUDA graph, plain and with programmatic dependent launch.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from quantmill.formats.config import config_to_json
from quantmill.formats.container import write_file
from quantmill.runtime.gpu.decoder import GpuRuntime
from quantmill.runtime.gpu.kernels.reading import read_kernel
from quantmill.runtime.gpu.reading import graph_ms, median_ms
from quantmill.runtime.gpu.steps import Kind, bucket_of
from quantmill.runtime.interface import PAGE, Piece
from quantmill.runtime.sampling import SamplerState
from quantmill.types import ActOrder, QuantConfig, SamplingParams

HIDDEN, INNER, HEADS, KV_HEADS, HEAD, VOCAB = 4096, 14336, 32, 8, 128, 32000
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HEADS * HEAD),
    "self_attn.k_proj": (HIDDEN, KV_HEADS * HEAD),
    "self_attn.v_proj": (HIDDEN, KV_HEADS * HEAD),
    "self_attn.o_proj": (HEADS * HEAD, HIDDEN),
    "mlp.gate_proj": (HIDDEN, INNER),
    "mlp.up_proj": (HIDDEN, INNER),
    "mlp.down_proj": (INNER, HIDDEN),
}
SHARED_ORDER = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
REPLAYS = 20


def write_checkpoint(folder: Path, config: QuantConfig, layers: int) -> None:
    """Uniform codes, scales for weights of about 0.02 with a mean of 0; true act order is a random g_idx."""
    from transformers import MistralConfig

    g = torch.Generator("cuda").manual_seed(1)

    def noise(*shape: int, scale: float = 0.02) -> torch.Tensor:
        return (torch.randn(*shape, device="cuda", generator=g) * scale).half()

    def tensors() -> Any:
        yield "model.embed_tokens.weight", noise(VOCAB, HIDDEN, scale=1.0)
        orders: dict[str, torch.Tensor] = {}
        for layer in range(layers):
            for suffix, (k, n) in SHAPES.items():
                name, short = f"model.layers.{layer}.{suffix}", suffix.split(".")[1]
                groups = config.groups(k)
                bits = config.bits
                words = torch.randint(
                    -(2**31), 2**31 - 1, (k * bits // 32, n), dtype=torch.int32, device="cuda", generator=g
                )
                yield f"{name}.qweight", words
                stored = 2 ** (bits - 1)  # v2
                field = sum(stored << i * bits for i in range(32))
                one = [(field >> 32 * w) & 0xFFFFFFFF for w in range(bits)]
                one = [w - (1 << 32) * (w >> 31) for w in one]
                yield f"{name}.qzeros", torch.tensor(one, dtype=torch.int32).repeat(groups, n // 32)
                spread = 0.02 * 3.4 / 2**bits
                signs = torch.where(torch.rand(groups, n, device="cuda", generator=g) < 0.5, -1.0, 1.0)
                sizes = torch.rand(groups, n, device="cuda", generator=g) * 0.4 + 0.8
                yield f"{name}.scales", (sizes * signs * spread).half()
                g_idx = torch.arange(k, device="cuda") // config.effective_group(k)
                if config.act_order is ActOrder.GROUPED:
                    if short not in SHARED_ORDER:
                        orders[short] = torch.randperm(k, device="cuda", generator=g)
                    g_idx = g_idx[orders[SHARED_ORDER.get(short, short)]]
                yield f"{name}.g_idx", g_idx.int()
            for norm in ("input_layernorm", "post_attention_layernorm"):
                yield f"model.layers.{layer}.{norm}.weight", noise(HIDDEN) + 1
        yield "model.norm.weight", noise(HIDDEN) + 1
        yield "lm_head.weight", noise(VOCAB, HIDDEN)

    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "model.safetensors", {k: t.cpu() for k, t in tensors()})
    model = MistralConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD, max_position_embeddings=131072,
        sliding_window=None, architectures=["MistralForCausalLM"],
    )  # fmt: skip
    quant = config_to_json(config, meta={})
    (folder / "config.json").write_text(json.dumps({**model.to_dict(), "quantization_config": quant}))


def floors(sizes: list[int], head: int, layers: int) -> dict[str, float]:
    """Milliseconds of read-only launches of these bytes: a chain, the same with PDL, and all in one."""
    words = [
        [torch.randint(-9, 9, (s // 4,), dtype=torch.int32, device="cuda") for s in sizes]
        for _ in range(layers)
    ]
    last = torch.randint(-9, 9, (head // 4,), dtype=torch.int32, device="cuda")
    x, y = (torch.randint(0, 9, (4096,), dtype=torch.int32, device="cuda") for _ in "xy")

    def chain(big: tuple[int, int, int], small: tuple[int, int, int], early: bool) -> None:
        pair = [x, y]
        for tensor in [t for layer in words for t in layer] + [last]:
            block, rounds, warps = big if tensor.numel() > 5_000_000 else small
            grid = (-(-tensor.numel() // (block * rounds)),)
            options = {"launch_pdl": True} if early else {}
            read_kernel[grid](tensor, *pair, tensor.numel(), block, rounds, early, num_warps=warps, **options)
            pair.reverse()

    found = {}
    for name, early in (("plain", False), ("pdl", True)):
        found[name] = min(
            graph_ms(lambda b=b, s=s, e=early: chain(b, s, e))
            for b in ((4096, 4, 4), (8192, 2, 8))
            for s in ((1024, 4, 4), (2048, 2, 4))
        )
    words.clear()
    total = layers * sum(sizes) + head
    every = torch.randint(-9, 9, (total // 4,), dtype=torch.int32, device="cuda")
    found["one"] = min(
        graph_ms(
            lambda b=b, r=r, w=w: read_kernel[(-(-len(every) // (b * r)),)](
                every, x, y, len(every), b, r, False, num_warps=w
            )
        )
        for b, r, w in ((8192, 2, 8), (8192, 4, 8), (4096, 4, 4))
    )
    found["read_gb_s"] = total / found["one"] / 1e6
    return found


def decode_ms(runtime: GpuRuntime, batch: int, context: int) -> float:
    """Milliseconds of one step of `batch` sequences that each hold `context` tokens."""
    per = -(-context // PAGE) + 1
    pieces = [Piece([7 + i], context - 1, tuple(range(i * per, (i + 1) * per))) for i in range(batch)]
    runtime.forward(pieces)
    return median_ms(lambda: runtime._steps.replay(bucket_of(batch), Kind.ALONE), REPLAYS)


def stream_rate(runtime: GpuRuntime, context: int, temperature: float, count: int = 256) -> float:
    """Tokens a second of a whole answer, drawn on the GPU and read by the host."""
    params = SamplingParams(temperature, 0.95, 40, 1.0, seed=1)
    pages = tuple(range(-(-(context + count) // PAGE)))
    tokens = torch.randint(0, VOCAB, (context,)).tolist()
    rates = []
    for _ in range(3):
        answer = runtime.stream([Piece(tokens, 0, pages)], [SamplerState(params)], count)
        next(answer)
        begin = time.perf_counter()
        made = sum(1 for _ in answer)
        rates.append(made / (time.perf_counter() - begin))
    return max(rates)


def prefill_ms(runtime: GpuRuntime, count: int) -> float:
    tokens = torch.randint(0, VOCAB, (count,)).tolist()
    piece = Piece(tokens, 0, tuple(range(-(-count // PAGE))))
    return median_ms(lambda: runtime.forward([piece]), 5)


def kernels_us(call: Any) -> list[tuple[str, int, float]]:
    """Kernels of a call by the profiler: name, launches, microseconds in all."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = defaultdict(list)
    for event in seen.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found[event.name[:48]].append(event.device_time)
    return sorted(((n, len(t), sum(t)) for n, t in found.items()), key=lambda row: -row[2])


def show_kernels(title: str, rows: list[tuple[str, int, float]]) -> None:
    print(title)
    for name, count, total in rows[:9]:
        print(f"   {name:48} {count:4} x {total / count:8.2f} us = {total:9.1f} us")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--act-order", action="store_true", help="true g_idx")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--quick", action="store_true", help="context 128 and 2048 only")
    parser.add_argument("--figures", action="store_true", help="neither tables of kernels nor whole answers")
    parser.add_argument("--folder", type=Path, help="keep the checkpoint there, or use the one that is there")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 2048, 8192, 32768])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--prompts", type=int, nargs="*", default=[128, 512, 2048, 8192])
    parser.add_argument("--kv", default="fp16")
    parser.add_argument(
        "--apart", action="store_true", help="kernels between the linears: eight a layer, not five"
    )
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        print("no NVIDIA GPU here: nothing to measure")
        return
    order = ActOrder.GROUPED if asked.act_order else ActOrder.STATIC
    config = QuantConfig(bits=asked.bits, group_size=asked.group, act_order=order)
    with tempfile.TemporaryDirectory() as scratch:
        folder = asked.folder or Path(scratch) / "model"
        if not (folder / "config.json").is_file():
            write_checkpoint(folder, config, asked.layers)
        measure(folder, asked)


def opened(folder: Path, asked: argparse.Namespace) -> tuple[GpuRuntime, float]:
    """The runtime and the seconds that loading took; what it took of memory is printed."""
    size = sum(f.stat().st_size for f in folder.iterdir())
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # what making the checkpoint took
    before = torch.cuda.mem_get_info()[0]
    begin = time.perf_counter()
    runtime = GpuRuntime.from_folder(
        folder, context=33 * 1024, kv_tokens=53248, kv_dtype=asked.kv, fused=not asked.apart
    )
    torch.cuda.synchronize()
    loaded = time.perf_counter() - begin
    runtime.forward([Piece([1], 0, (0,))]).argmax().item()
    first = time.perf_counter() - begin
    taken = before - torch.cuda.mem_get_info()[0]
    cache = runtime.facts.pages * runtime.facts.bytes_per_page
    print(
        f"{torch.cuda.get_device_name()}; {asked.bits} bits, group {asked.group}, act order {asked.act_order}; "
        f"file {size / 1e9:.2f} GB\nloaded in {loaded:.2f} s, first token at {first:.2f} s, "
        f"memory over file and cache {(taken - size - cache) / 1e9:.2f} GB",
        flush=True,
    )
    return runtime, loaded


def floor_of(runtime: GpuRuntime, layers: int) -> dict[str, float]:
    """What launches that only read the same bytes take here, ms a token; printed."""
    block = runtime.model.weights.blocks[0]
    attention = 2 * 128 * KV_HEADS * HEAD * 2
    sizes = [block.qkv.nbytes, attention, block.output.nbytes, block.gate_up.nbytes, block.down.nbytes]
    floor = floors(sizes, runtime.model.weights.head.nbytes, layers)
    print(
        f"read {floor['read_gb_s']:.0f} GB/s; {runtime.facts.bytes_per_token / 1e9:.3f} GB a token; "
        f"read-only launches: plain {1e3 / floor['plain']:.0f} tok/s, with PDL {1e3 / floor['pdl']:.0f}, "
        f"all in one {1e3 / floor['one']:.0f}",
        flush=True,
    )
    return floor


def many(runtime: GpuRuntime, asked: argparse.Namespace, report: dict[str, Any]) -> None:
    """Batches and prompts."""
    for batch in asked.batches:
        ms = decode_ms(runtime, batch, 128)
        report["batch"][batch] = batch * 1e3 / ms
        print(f"batch {batch:4}: {ms:8.3f} ms a step {batch * 1e3 / ms:9.0f} tok/s", flush=True)
    if 64 in asked.batches and not asked.figures:
        decode_ms(runtime, 64, 128)
        show_kernels(
            "kernels of a step, batch 64:", kernels_us(lambda: runtime._steps.replay(64, Kind.ALONE))
        )
    for count in asked.prompts:
        ms = prefill_ms(runtime, count)
        report["prefill"][count] = count * 1e3 / ms
        print(f"prompt {count:5}: {ms:8.2f} ms {count * 1e3 / ms:9.0f} tok/s", flush=True)
    if 2048 in asked.prompts and not asked.figures:
        piece = Piece(torch.randint(0, VOCAB, (2048,)).tolist(), 0, tuple(range(32)))
        show_kernels("kernels of a prompt of 2048:", kernels_us(lambda: runtime.forward([piece])))


def measure(folder: Path, asked: argparse.Namespace) -> None:
    runtime, loaded = opened(folder, asked)
    floor = floor_of(runtime, asked.layers)
    report: dict[str, Any] = {"floor": floor, "decode": {}, "batch": {}, "prefill": {}, "load_s": loaded}
    contexts = asked.contexts[:2] if asked.quick else asked.contexts
    base = None
    for context in contexts:
        ms = decode_ms(runtime, 1, context)
        base = base or ms
        bytes_read = runtime.facts.bytes_per_token + context * runtime.facts.bytes_per_page // PAGE
        share = bytes_read / ms / 1e6 / floor["read_gb_s"]
        report["decode"][context] = 1e3 / ms
        print(
            f"context {context:6}: {ms:7.3f} ms {1e3 / ms:7.1f} tok/s  {share:.2f} of the read rate  "
            f"{floor['pdl'] / ms:.2f} of the PDL floor  {base / ms:.2f} of context {contexts[0]}", flush=True
        )  # fmt: skip
    if not asked.figures:
        decode_ms(runtime, 1, contexts[0])
        show_kernels("kernels of a step:", kernels_us(lambda: runtime._steps.replay(1, Kind.ALONE)))
        rates = [stream_rate(runtime, contexts[0], t) for t in (0.0, 0.8)]
        print(
            f"whole answers at context {contexts[0]}: greedy {rates[0]:.0f} tok/s, drawn {rates[1]:.0f} tok/s",
            flush=True,
        )
    many(runtime, asked, report)
    if asked.json:
        asked.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
