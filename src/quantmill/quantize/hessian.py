"""The second moments of a linear's inputs, H = mean of x x^T, summed in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from quantmill.quantize.arithmetic import SLAB, add_products


class Hessian:
    """Sums x x^T over token batches; `mean` mirrors and divides, in place, and ends the summing.

    A sum over batches: those of several processes may be added up before the mean is taken.
    """

    def __init__(self, features: int, device: torch.device) -> None:
        self.sum = torch.zeros(features, features, device=device)
        self.tokens = 0
        self._mean: Tensor | None = None
        self.slab = SLAB.get(device.type, features)

    def add(self, x: Tensor) -> None:
        """x (..., K): any number of tokens, any float dtype.

        H is symmetric, so a slab of columns is multiplied with itself and with those before it only.
        """
        assert self._mean is None, "the mean has been taken"
        rows = x.reshape(-1, x.shape[-1])
        for low, high in self._slabs():
            add_products(self.sum[low:high, :high], rows[:, low:high], rows[:, :high])
        self.tokens += rows.shape[0]

    def mean(self) -> Tensor:
        """H (K, K) float32, exactly symmetric; the sum's own memory."""
        if self._mean is None:
            with torch.inference_mode():  # where the sum was made, it may be changed
                self._mirror()
                self._mean = self.sum.div_(max(1, self.tokens))
        return self._mean

    def _mirror(self) -> None:
        for low, high in self._slabs():
            self.sum[:low, low:high] = self.sum[low:high, :low].T
            square = self.sum[low:high, low:high]
            square.copy_(square.tril() + square.tril(-1).T)

    def _slabs(self) -> list[tuple[int, int]]:
        features = len(self.sum)
        return [(low, min(low + self.slab, features)) for low in range(0, features, self.slab)]
