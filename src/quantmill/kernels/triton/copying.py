"""A tiled linear's weights written out: the two kernels that do it, as functions. Chooses none."""

from __future__ import annotations

import torch
from torch import Tensor

from quantmill.kernels.triton.packing import TILE, TiledLinear


def fast_copy(t: TiledLinear, weight: Tensor) -> Tensor:
    """Every weight into `weight` (N, K) fp16 or bf16, in Gluon."""
    from quantmill.kernels.triton.expand import dense_kernel

    warps, halves = 4, torch.int16
    zeros = t.scales if t.zeros is None else t.zeros
    dense_kernel[(t.units, t.rows // (TILE * warps))](
        t.words.view(halves), t.scales.view(halves), zeros.view(halves), weight, *weight.shape,
        t.units, t.groups, t.shape.bits, t.shape.group_planes, t.shape.narrow, t.zeros is not None,
        weight.dtype == torch.bfloat16, warps, num_warps=warps,
    )  # fmt: skip
    return weight


def plain_copy(t: TiledLinear, weight: Tensor) -> Tensor:
    """The same on any GPU and in the interpreter, slower."""
    from quantmill.kernels.triton.repack import dequantise_kernel

    rows, halves = 64, torch.float16
    zeros = t.scales if t.zeros is None else t.zeros
    dequantise_kernel[(t.units, t.rows // rows)](
        t.words, t.scales.view(halves), zeros.view(halves), weight, *weight.shape,
        t.units, t.groups, t.shape.group, t.shape.bits, t.shape.narrow, t.zeros is not None, rows,
    )  # fmt: skip
    return weight
