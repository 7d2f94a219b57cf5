"""Second moments of a linear group's inputs in two streams: the original model's and the quantised one's.

    H = E[x x^T]            x   inputs in the quantised stream
    C = E[x_o x^T]          x_o inputs in the original stream, the same token
    D = E[(r_o - r) x^T]    r   the residual stream that the group's output is added to, both streams

Sums over token batches; pure functions of tensors, so that batches may be spread over devices and summed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantmill.quantize.arithmetic import add_products, precise_product
from quantmill.quantize.hessian import Hessian


@dataclass(frozen=True, slots=True)
class Goal:
    """What a stacked group should put out, seen from its inputs: loss(Q) = tr(Q H Q^T) - 2 tr(R Q^T) + const."""

    H: Tensor  # (K, K) float32, mean of x x^T
    R: Tensor  # (N, K) float32, mean of y x^T, y the wanted outputs
    tokens: int

    def loss(self, Q: Tensor) -> Tensor:
        """Mean squared output error per row up to a constant, (N,) float64, of weights Q (N, K)."""
        return ((precise_product(Q, self.H) - 2 * self.R) * Q).sum(1, dtype=torch.float64)


class Moments:
    """Accumulates H, C and D of one group over token batches."""

    def __init__(self, features: int, device: torch.device) -> None:
        self.hessian = Hessian(features, device)
        self.cross = torch.zeros(features, features, device=device)
        self.mismatch: Tensor | None = None

    def add(self, x: Tensor, original: Tensor, residual_gap: Tensor | None) -> None:
        """x and original (..., K): inputs in both streams; residual_gap (..., hidden): r_o - r, or None."""
        self.hessian.add(x)
        rows = x.reshape(-1, x.shape[-1])
        add_products(self.cross, original.reshape(rows.shape), rows)
        if residual_gap is not None:
            gap = residual_gap.reshape(len(rows), -1).to(rows.dtype)
            if self.mismatch is None:
                self.mismatch = torch.zeros(gap.shape[1], rows.shape[1], device=rows.device)
            add_products(self.mismatch, gap, rows)

    @property
    def tokens(self) -> int:
        return self.hessian.tokens

    def empty(self) -> Moments:
        """Sums over no tokens, of the same sizes."""
        none = Moments(len(self.cross), self.cross.device)
        none.mismatch = None if self.mismatch is None else torch.zeros_like(self.mismatch)
        return none

    def goal(self, W: Tensor, rows: slice = slice(None)) -> Goal:
        """The goal of stacked original weights W (N, K); ends the summing, and gives C's and D's memory back.

        rows: which of the group's rows W holds, where not all.
        """
        R = precise_product(W, self.cross)
        if self.mismatch is not None:
            R += self.mismatch[rows]
        self.cross, self.mismatch = R.new_empty(0), None
        return Goal(self.hessian.mean(), R.div_(max(1, self.tokens)), self.tokens)


def pooled(a: Goal, b: Goal) -> Goal:
    """The goal over the tokens of both."""
    tokens = a.tokens + b.tokens
    left, right = a.tokens / tokens, b.tokens / tokens
    return Goal(a.H * left + b.H * right, a.R * left + b.R * right, tokens)
