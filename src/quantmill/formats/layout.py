"""Shapes and sizes of a GPTQ linear's tensors, by arithmetic alone: no torch, so that plans are instant.

K is the number of inputs, N of outputs, G the group size (-1: K), as in docs/formats.md.
"""

from __future__ import annotations

from math import prod

from quantmill.types import QuantConfig

ITEM_BYTES = {"qweight": 4, "qzeros": 4, "scales": 2, "g_idx": 4, "bias": 2}


def tensor_shapes(
    bits: int, group_size: int, in_features: int, out_features: int
) -> dict[str, tuple[int, ...]]:
    """Suffix -> shape of the four tensors every GPTQ linear has (a bias, where there is one, is (N,))."""
    groups = 1 if group_size == -1 else -(-in_features // group_size)
    return {
        "qweight": (-(-in_features * bits // 32), out_features),
        "qzeros": (groups, -(-out_features * bits // 32)),
        "scales": (groups, out_features),
        "g_idx": (in_features,),
    }


def packed_bytes(config: QuantConfig, in_features: int, out_features: int, bias: bool = False) -> int:
    """Exact bytes of a linear's tensors in the file, `g_idx` included, headers not."""
    shapes = tensor_shapes(config.bits, config.group_size, in_features, out_features)
    total = sum(ITEM_BYTES[suffix] * prod(shape) for suffix, shape in shapes.items())
    return total + (ITEM_BYTES["bias"] * out_features if bias else 0)


def bits_per_weight(config: QuantConfig, in_features: int, out_features: int) -> float:
    """Bits of codes, scales and zeros per weight: bits + (16 + bits) / G where nothing is padded.

    Leaves out `g_idx`, which adds 32 / N and which no reader needs where groups are consecutive.
    """
    shapes = tensor_shapes(config.bits, config.group_size, in_features, out_features)
    stored = sum(ITEM_BYTES[s] * prod(shape) for s, shape in shapes.items() if s != "g_idx")
    return 8 * stored / (in_features * out_features)
