"""Quantised linears and folders made on the spot, rounded to nearest: nothing here is solved."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from quantmill.checkpoint import save_tensors
from quantmill.formats.gptq import config_to_json, dequantize, pack
from quantmill.types import CheckpointFormat, IntLinear, QuantConfig

FAMILIES = {
    "mistral": {"sliding_window": 8},
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "phi3": {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1},
    "gemma3_text": {
        "head_dim": 16,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


def group_index(in_features: int, config: QuantConfig, shuffled: bool = False) -> torch.Tensor:
    g_idx = torch.arange(in_features) // config.effective_group(in_features)
    return (g_idx[torch.randperm(in_features)] if shuffled else g_idx).to(torch.int32)


def random_linear(
    in_features: int, out_features: int, config: QuantConfig, *, shuffled: bool = False, seed: int = 0
) -> IntLinear:
    """Random codes and zeros; about half of the scales are negative where symmetric."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shape = (out_features, config.groups(in_features))
        scales = (torch.rand(shape) * 0.02 + 0.001) * (
            torch.randint(0, 2, shape) * 2 - 1 if config.sym else 1
        )
        lowest = 0 if config.zero_format is CheckpointFormat.GPTQ_V2 else 1
        zeros = torch.randint(lowest, config.max_code + 1, shape)
        return IntLinear(
            codes=torch.randint(0, config.max_code + 1, (out_features, in_features)).to(torch.uint8),
            scales=scales.to(torch.float16),
            zeros=(torch.full(shape, config.sym_zero) if config.sym else zeros).to(torch.uint8),
            g_idx=group_index(in_features, config, shuffled),
        )


def exact_weight(linear: IntLinear) -> torch.Tensor:
    """W (N, K) float64 by the definition, with no packing in between."""
    g = linear.g_idx.long()
    return linear.scales.double()[:, g] * (linear.codes.double() - linear.zeros.double()[:, g])


def round_to_nearest(weight: torch.Tensor, config: QuantConfig, *, shuffled: bool = False) -> IntLinear:
    """A symmetric grid as wide as each group's largest weight; scales of odd rows are negative."""
    out_features, in_features = weight.shape
    g_idx = group_index(in_features, config, shuffled)
    groups = config.groups(in_features)
    peak = torch.stack([weight[:, g_idx == g].abs().amax(1) for g in range(groups)], 1)
    sign = 1 - 2 * (torch.arange(out_features) % 2)
    scales = (sign[:, None] * peak / config.sym_zero).to(torch.float16)
    codes = (weight / scales.float()[:, g_idx.long()]).round() + config.sym_zero
    zeros = torch.full_like(scales, config.sym_zero, dtype=torch.uint8)
    return IntLinear(codes.clamp(0, config.max_code).to(torch.uint8), scales, zeros, g_idx)


def write_quantized(
    folder: Path,
    model: nn.Module,
    config: QuantConfig,
    *,
    shuffled: bool = False,
    head: bool = False,
    skip: tuple[str, ...] = (),
) -> nn.Module:
    """Quantise every linear of the blocks into a complete folder.

    Returns `model` itself, changed into the twin: its weights are what the folder's codes stand for.
    """
    tensors = {k: v.half() for k, v in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    for name, module in model.named_modules():
        wanted = (
            isinstance(module, nn.Linear) and (name != "lm_head" or head) and not name.endswith(skip or "?")
        )
        if not wanted:
            continue
        bias = None if module.bias is None else module.bias.data.half()
        packed = pack(round_to_nearest(module.weight.data, config, shuffled=shuffled), config, bias)
        module.weight.data = dequantize(packed, torch.float32)
        del tensors[f"{name}.weight"]
        for suffix in ("qweight", "qzeros", "scales", "g_idx"):
            tensors[f"{name}.{suffix}"] = getattr(packed, suffix)
    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    save_tensors(folder, tensors.items())
    quant = config_to_json(config, lm_head=head, meta={})
    edit_json(folder / "config.json", quantization_config=quant, dtype="float16")
    (folder / "quantize_config.json").write_text(json.dumps(quant))
    return model


def edit_json(path: Path, **changes: object) -> None:
    """Set keys of a JSON file; a value of None takes the key out."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
