"""GPTQ folders by rounding to the nearest, and the same weights inside a Transformers model. Not a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantmill.checkpoint import save_tensors, write_json
from quantmill.formats.gptq import config_to_json, dequantize, pack
from quantmill.types import ActOrder, IntLinear, PackedLinear, QuantConfig


def round_linear(weight: Tensor, config: QuantConfig, bias: Tensor | None, seed: int) -> PackedLinear:
    """Nearest codes; where act order is grouped, a random order in place of a measured one."""
    n, k = weight.shape
    size, groups = config.effective_group(k), config.groups(k)
    g_idx = torch.arange(k) // size
    if config.act_order is ActOrder.GROUPED:
        g_idx = g_idx[torch.randperm(k, generator=torch.Generator().manual_seed(seed))]
    scales, zeros = torch.empty(n, groups), torch.full((n, groups), config.sym_zero)
    for g in range(groups):
        part = weight[:, g_idx == g].float()
        if config.sym:
            scales[:, g] = part.abs().amax(1) / (config.sym_zero - 0.5)
        else:
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            scales[:, g] = (high - low) / config.max_code
            zeros[:, g] = (-low / scales[:, g]).round().clamp(0, config.max_code)
    scales = scales.clamp(min=1e-5).half()
    codes = (weight.float() / scales.float()[:, g_idx]).round() + zeros[:, g_idx]
    solved = IntLinear(codes.clamp(0, config.max_code).byte(), scales, zeros.byte(), g_idx.int())
    return pack(solved, config, bias)


def quantize_folder(model: Any, folder: Path, config: QuantConfig) -> None:
    """Write `model`'s linears as GPTQ, the rest as it is; put the dequantised weights into `model`."""
    tensors: dict[str, Tensor] = {}
    for name, module in model.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            packed = round_linear(module.weight.data, config, module.bias, seed=len(name))
            module.weight.data = dequantize(packed, torch.float32).to(module.weight.dtype)
            for field in ("qweight", "qzeros", "scales", "g_idx", "bias"):
                if (value := getattr(packed, field)) is not None:
                    tensors[f"model.layers.{name}.{field}"] = value
    for name, parameter in model.named_parameters():
        linear = name.rsplit(".", 1)[0]
        if f"{linear}.qweight" not in tensors:
            tensors[name] = parameter.data.half().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder, tensors.items())
    quant = config_to_json(config, meta={})
    write_json(folder / "quantize_config.json", quant)
    write_json(folder / "config.json", {**model.config.to_dict(), "quantization_config": quant})
