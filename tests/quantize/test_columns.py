"""The column loop: numba against torch, for widths around a vector's and a block's."""

from __future__ import annotations

import pytest
import torch

from quantmill.quantize.columns import round_columns_torch
from quantmill.quantize.columns_numba import round_columns_numba


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("n", [1, 17, 64])
@pytest.mark.parametrize("k", [1, 7, 8, 15, 16, 17, 33, 127, 128])
def test_numba_equals_torch(bits: int, n: int, k: int) -> None:
    g = torch.Generator().manual_seed(k)
    target, carried = (torch.randn(n, k, generator=g) * s for s in (1.0, 0.1))
    feedback = torch.randn(k, k, generator=g).triu(1) * 0.2 + torch.eye(k)
    scale = (torch.rand(n, k, generator=g) + 0.1) * torch.where(
        torch.rand(n, k, generator=g) < 0.5, -1.0, 1.0
    )
    zero = torch.randint(0, 2**bits, (n, k), generator=g).float()
    arguments = (target, carried, feedback, scale, zero, 2**bits - 1)
    codes, errors = round_columns_torch(*arguments)
    own_codes, own_errors = round_columns_numba(*arguments)
    rows = (codes == own_codes).all(1)  # a tie rounded the other way changes what follows it in that row
    assert rows.float().mean() > 0.9
    assert torch.allclose(errors[rows], own_errors[rows], atol=1e-5)


def test_no_feedback_is_rounding_to_nearest() -> None:
    target = torch.tensor([[0.26, -0.9, 3.0]])
    codes, errors = round_columns_torch(
        target, torch.zeros(1, 3), torch.eye(3), torch.full((1, 3), 0.5), torch.full((1, 3), 2.0), 3
    )
    assert codes.tolist() == [[3, 0, 3]]
    assert torch.allclose(errors, torch.tensor([[-0.24, 0.1, 2.5]]))
