"""What a product may do before and after it sums, so that a decoder needs no kernels in between. Knows no kernel.

All rows of a result have the same bits whatever rows come with them. Values that leave the range of float16 are
stored as its largest: an overflow must not become an infinity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantmill.kernels.triton.packing import TILE


@dataclass(frozen=True, slots=True)
class Norm:
    """The input was not yet normed: result row m is divided by sqrt(sum(squares[m]) / columns + epsilon) * scale.

    RMSNorm, whose gains and a power of two (`scale`) the maker of the input has put into it.
    """

    squares: Tensor  # (M, P) float32, sums of the squares of what is normed, in any parts
    columns: int
    epsilon: float
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Plain:
    """Store."""

    out: Tensor  # (M, N) any float, rows may lie apart


@dataclass(frozen=True, slots=True)
class Gated:
    """silu(gate) * up * scale, float32 inside. The linear's outputs come in the order of `gated_order`."""

    out: Tensor  # (M, places) fp16 or bf16; places that take nothing keep what they hold
    position: Tensor | None = None  # (N / 2,) int32: the column of each product; None: 0, 1, 2 ...
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Residual:
    """residual += y * times; after = residual * gain * scale, not yet normed; squares: of 16 columns each."""

    residual: Tensor  # (M, N) any float, float32 at best
    after: Tensor  # (M, places) fp16 or bf16, the next linear's x
    gain: Tensor  # (N,) any float
    squares: Tensor  # (M, N / 16) float32
    position: Tensor | None = None  # (N,) int32: the column of each value in `after`; None: 0, 1, 2 ...
    times: float = 1.0
    scale: float = 1.0


End = Plain | Gated | Residual


def gated_order(columns: int, device: torch.device | None = None) -> Tensor:
    """(2 * columns,) int64: the rows of [gate; up] in the order that `Gated` takes: 8 of gate, the same 8 of up ...

    `columns` is a multiple of 8.
    """
    half = TILE // 2
    rows = torch.arange(2 * columns, device=device).view(2, columns // half, half)
    return rows.transpose(0, 1).reshape(-1)
