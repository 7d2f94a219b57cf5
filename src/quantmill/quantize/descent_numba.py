"""The CPU twin of `descent.descend_block_torch`: rows are independent, so each runs its column loop alone."""

# mypy: disable-error-code="no-untyped-def, no-any-unimported"
from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor


@njit(cache=True, parallel=True, fastmath={"contract"})
def _descend_rows(current, gradient, H, scale, zero, top, codes, values):
    rows, columns = current.shape
    for n in prange(rows):
        G = gradient[n].copy()
        for k in range(columns):
            s, z = scale[n, k], zero[n, k]
            wanted = current[n, k] + G[k] / H[k, k]
            q = min(max(np.rint(wanted / s) + z, np.float32(0.0)), top)
            codes[n, k] = np.uint8(q)
            value = s * (q - z)
            values[n, k] = value
            moved = value - current[n, k]
            if moved != np.float32(0.0):
                for i in range(k + 1, columns):
                    G[i] -= moved * H[k, i]


def descend_block_numba(
    current: Tensor, gradient: Tensor, H: Tensor, scale: Tensor, zero: Tensor, max_code: int
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as `descent.descend_block_torch`; tensors on the CPU."""
    codes = torch.empty(current.shape, dtype=torch.uint8)
    values = torch.empty(current.shape)
    _descend_rows(
        current.contiguous().numpy(),
        gradient.contiguous().numpy(),
        H.contiguous().numpy(),
        scale.contiguous().numpy(),
        zero.contiguous().numpy(),
        np.float32(max_code),
        codes.numpy(),
        values.numpy(),
    )
    return codes, values
