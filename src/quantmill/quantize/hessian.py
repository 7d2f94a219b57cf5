"""The second moments of a linear's inputs, H = mean of x x^T, summed in float32."""

from __future__ import annotations

import torch
from torch import Tensor

SLAB = 192  # columns at a time: H is symmetric, so a slab is multiplied with itself and those before it only


class Hessian:
    """Sums x x^T over token batches; `mean` mirrors and divides."""

    def __init__(self, features: int, device: torch.device) -> None:
        self.sum = torch.zeros(features, features, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """x (..., K): any number of tokens, any float dtype."""
        rows = x.reshape(-1, x.shape[-1]).float()
        for low in range(0, rows.shape[1], SLAB):
            high = min(low + SLAB, rows.shape[1])
            self.sum[low:high, :high].addmm_(rows[:, low:high].T, rows[:, :high])
        self.tokens += rows.shape[0]

    def mean(self) -> Tensor:
        """H (K, K) float32, exactly symmetric."""
        lower = self.sum.tril()
        return (lower + lower.tril(-1).T) / max(1, self.tokens)
