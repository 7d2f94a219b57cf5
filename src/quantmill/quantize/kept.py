"""Solved linears as a run keeps them between blocks: packed, under their names in the file, on the CPU."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantmill.formats.gptq import pack, unpack
from quantmill.types import IntLinear, PackedLinear, QuantConfig

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")


def packed_tensors(
    name: str, linear: IntLinear, config: QuantConfig, bias: Tensor | None
) -> dict[str, Tensor]:
    """What the file will hold of a linear. bias: (N,) of any dtype, kept in float16."""
    packed = pack(linear, config, None if bias is None else bias.detach().half())
    tensors = {suffix: getattr(packed, suffix) for suffix in (*SUFFIXES, "bias")}
    return {f"{name}.{suffix}": t.cpu() for suffix, t in tensors.items() if t is not None}


def unpacked(
    tensors: Mapping[str, Tensor], name: str, config: QuantConfig, device: torch.device
) -> IntLinear:
    """A linear again, from what `packed_tensors` made of it; its bias is left to the model."""
    parts = {suffix: tensors[f"{name}.{suffix}"].to(device) for suffix in SUFFIXES}
    packed = PackedLinear(
        **parts,
        bias=None,
        bits=config.bits,
        group_size=config.group_size,
        in_features=len(parts["g_idx"]),
        out_features=parts["scales"].shape[1],
        checkpoint_format=config.zero_format,
    )
    return unpack(packed)
