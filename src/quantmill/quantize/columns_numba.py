"""The CPU twin of `columns.round_columns_torch`: rows are independent, so each runs its column loop alone."""

# mypy: disable-error-code="no-untyped-def, no-any-unimported"
from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor


# "reassoc" lets the sum run in vector lanes.
@njit(cache=True, fastmath={"reassoc", "contract", "nsz"})
def _dot(a, b):
    total = np.float32(0.0)
    for i in range(a.size):
        total += a[i] * b[i]
    return total


@njit(cache=True, parallel=True)
def _round_rows(target, carried, feedback_t, scale, zero, top, codes, errors):
    rows, columns = target.shape
    for n in prange(rows):
        for k in range(columns):
            t = target[n, k] + carried[n, k] + _dot(errors[n, :k], feedback_t[k, :k])
            s, z = scale[n, k], zero[n, k]
            q = min(max(np.rint(t / s) + z, np.float32(0.0)), top)
            codes[n, k] = np.uint8(q)
            errors[n, k] = target[n, k] - s * (q - z)


def round_columns_numba(
    target: Tensor, carried: Tensor, feedback: Tensor, scale: Tensor, zero: Tensor, max_code: int
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as `columns.round_columns_torch`; tensors on the CPU."""
    codes = torch.empty(target.shape, dtype=torch.uint8)
    errors = torch.empty(target.shape)
    _round_rows(
        target.contiguous().numpy(),
        carried.contiguous().numpy(),
        feedback.T.contiguous().numpy(),
        scale.contiguous().numpy(),
        zero.contiguous().numpy(),
        np.float32(max_code),
        codes.numpy(),
        errors.numpy(),
    )
    return codes, errors
