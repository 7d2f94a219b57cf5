"""The column loop: codes for a block, each column's error fed into the ones after it. The slow twin, any device.

Feedback in LDLQ form (equal to GPTQ's, integer for integer): t_k = b_k + sum_{i<k} e_i A_ik, where A is
unit upper triangular, b holds the feedback from earlier blocks already, and e_i is the error against the
target itself.
"""

from __future__ import annotations

import torch
from torch import Tensor


def round_columns_torch(
    target: Tensor, carried: Tensor, feedback: Tensor, scale: Tensor, zero: Tensor, max_code: int
) -> tuple[Tensor, Tensor]:
    """Codes of one block of b columns.

    target (N, b) what the block should be, carried (N, b) feedback from earlier blocks, feedback (b, b)
    this block's part of A, scale and zero (N, b) the grid of every column; all float32 -> codes (N, b)
    uint8, errors target - dequantised (N, b) float32.
    """
    codes = torch.empty(target.shape, dtype=torch.uint8, device=target.device)
    errors = torch.zeros_like(target)
    for k in range(target.shape[1]):
        t = target[:, k] + carried[:, k] + errors[:, :k] @ feedback[:k, k]
        s, z = scale[:, k], zero[:, k]
        q = torch.clamp(torch.round(t / s) + z, 0, max_code)
        codes[:, k] = q.to(torch.uint8)
        errors[:, k] = target[:, k] - s * (q - z)
    return codes, errors


# ---- how (N, K) matrices lie: a GPU's rows are rounded side by side, so there columns are contiguous


def in_order(x: Tensor, order: Tensor) -> Tensor:
    """x[:, order] of x (N, K)."""
    return x.T[order].T if x.is_cuda else x[:, order]


def in_place(x: Tensor, order: Tensor) -> Tensor:
    """Undo `in_order` with a permutation: column order[i] of the result is column i of x."""
    return in_order(x, torch.argsort(order))


def fed_back(errors: Tensor, feedback: Tensor) -> Tensor:
    """errors (N, i) times feedback (i, b), laid out as `in_order` lays out a device's matrices."""
    return (feedback.T @ errors.T).T if errors.is_cuda else errors @ feedback
