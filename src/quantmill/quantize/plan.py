"""What a run will need and make, before it starts. Works from `config.json` alone.

Sizes are those of the tensors in the file; memory is `memory`'s. Time is operations over a matmul rate
measured here in a fraction of a second.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quantmill.architectures import Dimensions, LinearShape, architecture_of, dimensions, linear_shapes
from quantmill.formats.gptq import packed_bytes
from quantmill.quantize.job import rows_share
from quantmill.quantize.memory import choose, cpu_bytes, gpu_peak, host_bytes, load_of
from quantmill.quantize.presets import recipe_of
from quantmill.types import Json, QuantConfig, Variant

HEADER = 128  # bytes a tensor costs in a safetensors header, at most but for very long names


@dataclass(frozen=True, slots=True)
class VariantPlan:
    """Prediction for one variant: bytes, and seconds of a run that makes them all."""

    branch: str
    config: QuantConfig
    size_bytes: int
    bits_per_weight: float  # of the quantised linears, scales and zeros counted
    peak_vram_bytes: int  # to quantise on a GPU, the driver's part included
    peak_host_bytes: int  # of host memory beside that
    peak_ram_bytes: int  # to quantise on a CPU
    seconds: float

    def to_json(self) -> Json:
        """A row of the document that `--json` prints."""
        return {
            "branch": self.branch,
            "bits": self.config.bits,
            "group_size": self.config.group_size,
            "desc_act": self.config.desc_act,
            "sym": self.config.sym,
            "damp_percent": self.config.damp_percent,
            "size_bytes": self.size_bytes,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "peak_vram_bytes": self.peak_vram_bytes,
            "peak_host_bytes": self.peak_host_bytes,
            "peak_ram_bytes": self.peak_ram_bytes,
            "seconds": round(self.seconds, 1),
        }


def plan(
    config: Json,
    variants: Sequence[Variant],
    *,
    samples: int,
    seqlen: int,
    flops_per_second: float,
    max_vram: int | None = None,
    max_ram: int | None = None,
    preset: str = "fast",
) -> list[VariantPlan]:
    """Predictions for every variant of one run. Raises UnsupportedModel or BadCheckpoint for a bad config.

    Memory is that of the whole run, in the fastest way that fits the limits; BadRequest if none does. The limit
    on host memory is for a run on a GPU.
    """
    dims, shapes = dimensions(config), linear_shapes(config)
    paired = [recipe_of(preset, v).two_streams for v in variants]
    on_gpu = load_of(config, variants, samples, seqlen, "cuda", paired)
    on_cpu = load_of(config, variants, samples, seqlen, "cpu", paired)
    way = choose(on_gpu, "cuda", vram=max_vram, ram=max_ram)
    ram = cpu_bytes(on_cpu, choose(on_cpu, "cpu", vram=None, ram=None))
    out = []
    for v in variants:
        tokens = round(samples * rows_share(v.config)) * seqlen
        out.append(
            VariantPlan(
                branch=v.branch,
                config=v.config,
                size_bytes=size_bytes(config, v.config),
                bits_per_weight=bits_per_weight(config, v.config),
                peak_vram_bytes=gpu_peak(on_gpu, way),
                peak_host_bytes=host_bytes(on_gpu, way),
                peak_ram_bytes=ram,
                seconds=operations(dims, shapes, tokens, seqlen) / flops_per_second,
            )
        )
    return out


def size_bytes(config: Json, quant: QuantConfig) -> int:
    """Bytes of the weight files: packed linears, everything else in float16."""
    dims, shapes, row = dimensions(config), linear_shapes(config), architecture_of(config)
    packed = sum(packed_bytes(quant, s.in_features, s.out_features, bias=s.bias) for s in shapes.values())
    embeddings = dims.vocab * dims.hidden * (1 if dims.tied else 2)
    rest = embeddings + dims.hidden + dims.layers * row.norms_per_block(dims)
    tensors = dims.layers * (4 * len(shapes) + 2) + 3
    return dims.layers * packed + 2 * rest + HEADER * tensors


def bits_per_weight(config: Json, quant: QuantConfig) -> float:
    """Stored bits over quantised weights: codes, scales and zeros."""
    shapes = linear_shapes(config).values()
    bits = sum(
        s.out_features * (s.in_features * quant.bits + quant.groups(s.in_features) * (16 + quant.bits))
        for s in shapes
    )
    return bits / sum(s.out_features * s.in_features for s in shapes)


def operations(dims: Dimensions, shapes: dict[str, LinearShape], tokens: int, seqlen: int) -> float:
    """Operations of calibrating one variant: forward, Hessians (half of X^T X), factors and solving."""
    weights = sum(s.in_features * s.out_features for s in shapes.values())
    inputs = {
        "o": dims.heads * dims.head_dim,
        "down": dims.intermediate,
        "qkv": dims.hidden,
        "gate_up": dims.hidden,
    }
    forward = 2.0 * tokens * weights + 2.0 * tokens * seqlen * dims.heads * dims.head_dim
    hessians = sum(1.1 * tokens * k * k for k in inputs.values())
    solving = sum(6.0 * s.out_features * s.in_features * s.in_features for s in shapes.values())
    return dims.layers * (forward + hessians + solving + sum(2.0 * k**3 for k in inputs.values()))


def measure_flops() -> float:
    """Matrix multiplication rate of this CPU in operations per second, single precision, in about 0.2 s."""
    x = np.random.default_rng(0).random((1024, 1024), dtype=np.float32)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        x @ x
        best = min(best, time.perf_counter() - began)
    return float(2 * 1024**3 / best)


def quantised_weights(config: Json) -> int:
    """How many weights of a model GPTQ quantises."""
    return dimensions(config).layers * sum(
        s.in_features * s.out_features for s in linear_shapes(config).values()
    )
