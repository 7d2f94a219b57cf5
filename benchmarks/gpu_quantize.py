"""How long a GPU takes to quantise Mistral-7B shapes, beside what the arithmetic alone would take there.

    python benchmarks/gpu_quantize.py [--layers 2] [--variant 4bit-128g ...] [--samples 128] [--seqlen 2048]
                                      [--max-vram BYTES] [--max-ram BYTES] [--source FOLDER] [--profile]

Random weights and tokens (never zeros) in a real safetensors folder, in the scratch folder; the pipeline is
the product's. With fewer layers than 32 the time of 32 is the time of one more layer, 32 times, plus what
does not depend on layers. The floor adds up operations over rates that this program measures first.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from quantmill.architectures import dimensions, linear_shapes
from quantmill.files import read_json
from quantmill.formats.container import write_file
from quantmill.hub.variants import parse_variant
from quantmill.quantize import calibration, memory
from quantmill.quantize.arithmetic import tensor_cores
from quantmill.quantize.job import Job, ModuleSolved, rows_share
from quantmill.quantize.pipeline import peak_ram_bytes, quantize
from quantmill.quantize.presets import recipe_of
from quantmill.types import CalibrationSet

MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 4096,
    "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32,
    "vocab_size": 32000, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "hidden_act": "silu", "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip


def make_model(folder: Path, layers: int, device: str = "cuda") -> dict[str, object]:
    """A folder of Mistral-7B shapes with random bfloat16 weights, a file per layer."""
    config = MISTRAL_7B | {"num_hidden_layers": layers}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    shapes, hidden, vocab = linear_shapes(config), config["hidden_size"], config["vocab_size"]
    weight_map: dict[str, str] = {}

    def save(number: int, make: Callable[[], dict[str, torch.Tensor]]) -> None:
        name = f"model-{number + 1:05}-of-{layers + 1:05}.safetensors"
        tensors = {k: v.bfloat16() for k, v in make().items()}
        write_file(folder / name, tensors)
        weight_map.update(dict.fromkeys(tensors, name))

    def layer(i: int) -> dict[str, torch.Tensor]:
        p = f"model.layers.{i}."
        return {f"{p}{m}.weight": torch.randn(s.out_features, s.in_features, device=device) * 0.02
                for m, s in shapes.items()} | {
                f"{p}{n}_layernorm.weight": 1 + 0.1 * torch.randn(hidden, device=device)
                for n in ("input", "post_attention")}  # fmt: skip

    def ends() -> dict[str, torch.Tensor]:
        return {"model.embed_tokens.weight": torch.randn(vocab, hidden, device=device),
                "lm_head.weight": torch.randn(vocab, hidden, device=device) * 0.02,
                "model.norm.weight": torch.ones(hidden, device=device)}  # fmt: skip

    with ThreadPoolExecutor(8) as pool:
        parts = [functools.partial(layer, i) for i in range(layers)]
        list(pool.map(save, range(layers + 1), [*parts, ends]))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return config


def rate(flops: float, run, repeats: int = 5) -> float:
    """Operations per second of a device function, the best of a few."""
    run()
    best = 0.0
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        best = max(best, flops / (begin.elapsed_time(end) / 1e3))
    return best


@functools.cache
def measured_rates() -> dict[str, float]:
    """Square products of every kind that the pipeline uses."""
    rates = {}
    for name, dtype, n in (
        ("fp16", torch.float16, 8192),
        ("fp32", torch.float32, 8192),
        ("fp64", torch.float64, 4096),
    ):
        a, b = (torch.randn(n, n, device="cuda").to(dtype) for _ in range(2))
        rates[name] = rate(2 * n**3, lambda a=a, b=b: a @ b)
    with tensor_cores():
        a, b = (torch.randn(8192, 8192, device="cuda") for _ in range(2))
        rates["tf32"] = rate(2 * 8192**3, lambda: a @ b)
    return rates


def floor_seconds(
    config: dict[str, object], variants, samples: int, seqlen: int, preset: str
) -> dict[str, float]:
    """Operations over measured rates, nothing else: one layer of every variant, by stage."""
    d, shapes, rates = dimensions(config), linear_shapes(config), measured_rates()
    weights = sum(s.out_features * s.in_features for s in shapes.values())
    inputs = (d.hidden, d.hidden, d.heads * d.head_dim, d.intermediate)
    square = sum(s.out_features * s.in_features**2 for s in shapes.values())
    stages = dict.fromkeys(("forward", "moments", "factors", "columns", "refit", "losses", "best"), 0.0)
    for v in variants:
        recipe = recipe_of(preset, v)
        two, rounds = 1 + recipe.two_streams, recipe.rounds
        tokens = max(1, round(samples * rows_share(v.config))) * seqlen
        attention = 2.0 * tokens * seqlen * d.heads * d.head_dim  # causal: half of QK and half of PV
        stages["forward"] += two * (2.0 * tokens * weights + attention) / rates["fp16"]
        moments = sum(tokens * k * k * (3.0 if recipe.two_streams else 1.0) for k in inputs)
        if recipe.residual:
            moments += sum(2.0 * tokens * k * d.hidden for k in inputs[2:])
        stages["moments"] += moments / rates["fp16"]
        ridges = len(recipe.shift_ridges) if recipe.two_streams else 0
        stages["factors"] += (1 + ridges) * sum(k**3 / 3 for k in inputs) / rates["fp64"]
        stages["columns"] += square / rates["fp32"]
        refits = (v.config.bits <= 4) + rounds
        stages["refit"] += refits * square * (6 + 3) / rates["tf32"]  # W H in halves; products of groups
        looks = 2 + (2 * rounds + 2 + 2 + 2 * ridges if recipe.two_streams else 0)
        stages["losses"] += looks * square * 6 / rates["tf32"]  # a product of halves each
        stages["best"] += square * (
            2 * ridges / rates["fp64"] + 2 * rounds / rates["fp32"]
        )  # shifts, descent
    return stages


class Clock:
    """When every linear was solved, and the most GPU memory that was taken on the way there."""

    def __init__(self) -> None:
        torch.cuda.synchronize()
        self.began = time.perf_counter()
        self.solved: list[tuple[str, str, float, int]] = []  # branch, module, seconds, bytes
        self.most = 0

    def now(self) -> float:
        return time.perf_counter() - self.began

    def hear(self, event: object) -> None:
        if isinstance(event, ModuleSolved):
            taken = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self.most = max(self.most, taken)
            self.solved.append((event.branch, event.report.name, self.now(), taken))

    def first(self) -> float:
        """When the first layer was solved for all variants."""
        return max(at for _, name, at, _ in self.solved if ".layers.0." in name)

    def per_layer(self) -> float:
        """Seconds of one more layer: loading and the lanes' way to its end counted."""
        last = max(at for _, _, at, _ in self.solved)
        layers = {name.split(".")[2] for _, name, _, _ in self.solved}
        return (last - self.first()) / max(1, len(layers) - 1)

    def print_stages(self) -> None:
        """The second layer, group by group: seconds since the group before, and the peak within them."""
        before = self.first()
        for branch, name, at, taken in self.solved:
            if ".layers.1." in name:
                print(
                    f"  {branch[:24]:24} {name.split('.')[-1]:10} {at - before:.3f} s {taken / 1e9:6.2f} GB"
                )
                before = at


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--variant", action="append")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--max-vram", type=float)
    parser.add_argument("--max-ram", type=float)
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--source", type=Path, help="made there if it does not exist, and kept")
    parser.add_argument("--scratch", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--profile", action="store_true")
    asked = parser.parse_args(words)
    scratch = Path(tempfile.mkdtemp(dir=asked.scratch))
    try:
        measure(asked, scratch)
    finally:
        shutil.rmtree(scratch)


def show_memory(clock: Clock, load: memory.Load, limits: dict[str, int]) -> None:
    """What was held, beside what was predicted."""
    most = max(clock.most, torch.cuda.max_memory_allocated())
    print(
        f"peak GPU memory {most / 1e9:.2f} GB allocated, {torch.cuda.max_memory_reserved() / 1e9:.2f} reserved; "
        f"host {peak_ram_bytes() / 1e9:.2f} GB"
    )
    free, whole = torch.cuda.mem_get_info()
    print(f"the device has given out {(whole - free) / 1e9:.2f} GB, the driver's part included")
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    way = memory.choose(load, "cuda", vram=limits.get("max_vram", free), ram=limits.get("max_ram"))
    print(
        f"predicted for {way.name}: GPU {memory.gpu_bytes(load, way) / 1e9:.2f} GB, {memory.GPU_BASE / 1e9:.2f} "
        f"of it the driver's; host {memory.host_bytes(load, way) / 1e9:.2f} GB"
    )


def measure(asked: argparse.Namespace, scratch: Path) -> None:
    variants = tuple(parse_variant(v) for v in asked.variant or ["4bit-128g"])
    rates = measured_rates()
    source = asked.source or scratch / "source"
    config = read_json(source / "config.json") if source.exists() else make_model(source, asked.layers)
    layers = int(config["num_hidden_layers"])
    print(
        "measured rates, TFLOP/s: " + ", ".join(f"{k} {v / 1e12:.0f}" for k, v in rates.items()), flush=True
    )
    blocks = torch.randint(
        0, config["vocab_size"], (asked.samples, asked.seqlen), generator=torch.Generator().manual_seed(0)
    )
    data = CalibrationSet(blocks, "random", 0, calibration.fingerprint(blocks), asked.samples, 0)
    limits = {k: int(v) for k, v in (("max_vram", asked.max_vram), ("max_ram", asked.max_ram)) if v}
    job = Job(
        source=source,
        source_name="7B shapes",
        out=scratch / "out",
        variants=variants,
        calibration=data,
        preset=asked.preset,
        device="cuda",
        **limits,
    )
    paired = [recipe_of(asked.preset, v).two_streams for v in variants]
    load = memory.load_of(config, variants, asked.samples, asked.seqlen, "cuda", paired)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    clock = Clock()

    def run():
        return quantize(job, clock.hear)

    done = profiled(run) if asked.profile else run()
    layer = clock.per_layer()
    stages = floor_seconds(config, variants, asked.samples, asked.seqlen, asked.preset)
    floor = sum(stages.values())
    print(
        f"{len(variants)} variant(s), {asked.samples} x {asked.seqlen} tokens, {layers} layers: first "
        f"layer solved at {clock.first():.2f} s, each further {layer:.3f} s, all {clock.now():.2f} s"
    )
    print(
        f"32 layers: {clock.first() + 31 * layer:.1f} s; floor {32 * floor:.1f} s, ratio {layer / floor:.2f}"
    )
    print("floor of a layer, ms: " + ", ".join(f"{k} {1e3 * s:.0f}" for k, s in stages.items()))
    clock.print_stages()
    show_memory(clock, load, limits)
    for f in done:
        print(f"{f.branch}: {f.seconds:.2f} s, losses " + " ".join(f"{m.loss:.2e}" for m in f.modules[:7]))


def profiled(run):
    """What `run` returns; prints the kernels it spent its time in, and the torch operators that started them."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
        done = run()
    events = prof.key_averages()
    for kind, rows in (
        ("kernels", [e for e in events if e.device_type == DeviceType.CUDA]),
        (
            "operators",
            [e for e in events if e.device_type == DeviceType.CPU and e.self_device_time_total > 0],
        ),
    ):
        rows = sorted(rows, key=lambda e: -e.self_device_time_total)
        print(f"{kind}: {sum(e.self_device_time_total for e in rows) / 1e3:.0f} ms on the GPU")
        for e in rows[:24]:
            print(f"{e.self_device_time_total / 1e3:9.1f} ms {e.count:6} x {e.key[:90]}")
    return done


if __name__ == "__main__":
    main()
