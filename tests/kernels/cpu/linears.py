"""Random GPTQ linears of every kind, and their slow twin in float64. Not a test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from quantmill.formats.gptq import dequantize, pack
from quantmill.types import ActOrder, IntLinear, PackedLinear, QuantConfig


@dataclass(frozen=True, slots=True)
class Shape:
    """out_features, in_features, columns in a group (-1: all), true act order, bias."""

    n: int
    k: int
    group: int
    ordered: bool = False
    bias: bool = False


def random_linear(shape: Shape, bits: int, sym: bool, seed: int = 0) -> PackedLinear:
    """Codes over the whole range, scales of both signs."""
    rng = torch.Generator().manual_seed(seed)
    config = QuantConfig(
        bits=bits,
        group_size=shape.group,
        sym=sym,
        act_order=ActOrder.GROUPED if shape.ordered else ActOrder.NONE,
    )
    groups, size = config.groups(shape.k), config.effective_group(shape.k)
    codes = torch.randint(0, 2**bits, (shape.n, shape.k), generator=rng, dtype=torch.uint8)
    scales = torch.rand(shape.n, groups, generator=rng) * 0.02 + 0.001
    scales *= torch.where(torch.rand(shape.n, groups, generator=rng) < 0.3, -1.0, 1.0)
    zeros = torch.full((shape.n, groups), config.sym_zero, dtype=torch.uint8)
    if not sym:
        zeros = torch.randint(0, 2**bits, (shape.n, groups), generator=rng, dtype=torch.uint8)
    g_idx = torch.arange(shape.k) // size
    if shape.ordered:
        g_idx = g_idx[torch.randperm(shape.k, generator=rng)]
    bias = torch.randn(shape.n, generator=rng) if shape.bias else None
    return pack(IntLinear(codes, scales.half(), zeros, g_idx.int()), config, bias)


def twin(x: NDArray[np.floating], packed: PackedLinear) -> NDArray[np.float64]:
    """x W.T + bias in float64."""
    weight = dequantize(packed, torch.float64).numpy()
    y: NDArray[np.float64] = x.astype(np.float64) @ weight.T
    return y if packed.bias is None else y + packed.bias.double().numpy()


def int8_twin(x: NDArray[np.float32], packed: PackedLinear) -> NDArray[np.float64]:
    """The same with activations rounded to int8, 32 of a group at a time, by a slow loop."""
    return _rounded_twin(x, packed, np.rint)


def int16_twin(x: NDArray[np.float32], packed: PackedLinear) -> NDArray[np.float64]:
    """The same with what is left rounded once more, to 256ths of the step (127 at most)."""

    def rounded(steps: NDArray[np.float32]) -> NDArray[np.float32]:
        whole = np.rint(steps)
        rest: NDArray[np.float32] = np.rint((steps - whole) * 256).clip(-127, 127)
        return whole + rest / 256

    return _rounded_twin(x, packed, rounded)


def _rounded_twin(
    x: NDArray[np.float32],
    packed: PackedLinear,
    rounded: Callable[[NDArray[np.float32]], NDArray[np.float32]],
) -> NDArray[np.float64]:
    result = np.zeros(x.shape, np.float64)
    g_idx = packed.g_idx.numpy()
    for group in range(int(g_idx.max()) + 1):
        columns = np.flatnonzero(g_idx == group)
        for begin in range(0, len(columns), 32):
            part = columns[begin : begin + 32]
            scale = np.abs(x[:, part]).max(axis=1, keepdims=True) / np.float32(127)
            scale = np.where(scale > 0, scale, np.float32(1))
            result[:, part] = rounded(x[:, part] / scale).astype(np.float64) * scale
    return twin(result, packed)


def inputs(rows: int, columns: int, seed: int = 1) -> NDArray[np.float32]:
    """Normal, with a zero slice and an outlier, as activations have them."""
    x = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    x[:, :32] = 0 if columns > 32 else x[:, :32]
    x[0, columns // 2] = 40.0
    return x


def error(found: NDArray[np.float32], wanted: NDArray[np.float64]) -> float:
    """Largest difference over the largest value."""
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())
