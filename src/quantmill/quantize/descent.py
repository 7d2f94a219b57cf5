"""Coordinate descent on codes: every column moves to its best code given all others. The slow twin, any device.

With E = T - Q the error against the target and G = E H its gradient, column k of a row is best at
q_k + G_k / H_kk; a move of d there takes d H_k from G (CDQuant, Nair and Suggala 2024, arXiv:2406.17542).
The loss tr(E H E^T) never rises.
"""

from __future__ import annotations

import torch
from torch import Tensor


def descend_block_torch(
    current: Tensor, gradient: Tensor, H: Tensor, scale: Tensor, zero: Tensor, max_code: int
) -> tuple[Tensor, Tensor]:
    """One pass over a block of b columns.

    current (N, b) dequantised weights, gradient (N, b) of the block, H (b, b) its part of the Hessian, scale
    and zero (N, b) the grid of every column; all float32 -> codes (N, b) uint8, dequantised (N, b) float32.
    """
    codes = torch.empty(current.shape, dtype=torch.uint8, device=current.device)
    values, G = torch.empty_like(current), gradient.clone()
    for k in range(current.shape[1]):
        s, z = scale[:, k], zero[:, k]
        wanted = current[:, k] + G[:, k] / H[k, k]
        q = torch.clamp(torch.round(wanted / s) + z, 0, max_code)
        codes[:, k] = q.to(torch.uint8)
        values[:, k] = s * (q - z)
        G[:, k:] -= (values[:, k] - current[:, k])[:, None] * H[k, k:]
    return codes, values
