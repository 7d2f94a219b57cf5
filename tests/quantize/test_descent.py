"""Coordinate descent: numba against torch around tile edges, and a loss that never rises."""

from __future__ import annotations

import itertools

import pytest
import torch

from quantmill.quantize.descent import descend_block_torch
from quantmill.quantize.descent_numba import descend_block_numba
from quantmill.quantize.refine import descend
from quantmill.quantize.solver import dequantize, factorise, round_to_grid
from quantmill.types import QuantConfig


def block(bits: int, n: int, k: int) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(100 * n + k)
    x = torch.randn(4 * k + 8, k, generator=g)
    H = x.T @ x / len(x)
    scale = (torch.rand(n, k, generator=g) + 0.1) * torch.where(torch.rand(n, k, generator=g) < 0.5, -1, 1)
    zero = torch.randint(0, 2**bits, (n, k), generator=g).float()
    codes = torch.randint(0, 2**bits, (n, k), generator=g).float()
    current = scale * (codes - zero)
    return current, torch.randn(n, k, generator=g), H, scale, zero


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("n", [1, 17])
@pytest.mark.parametrize("k", [1, 7, 8, 15, 16, 17, 127, 128])
def test_numba_equals_torch(bits: int, n: int, k: int) -> None:
    arguments = (*block(bits, n, k), 2**bits - 1)
    codes, values = descend_block_torch(*arguments)
    own_codes, own_values = descend_block_numba(*arguments)
    rows = (codes == own_codes).all(1)  # a tie rounded the other way changes what follows it in that row
    assert rows.float().mean() > 0.9
    assert torch.allclose(values[rows], own_values[rows], atol=1e-6)


@pytest.mark.parametrize("group", [8, 32, -1])
@pytest.mark.parametrize("device_path", ["numba", "torch"])
def test_the_loss_never_rises(group: int, device_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from quantmill.quantize import machines

    if device_path == "torch":
        monkeypatch.setattr(machines, "_cpu", machines._plain)
    g = torch.Generator().manual_seed(2)
    W, x = torch.randn(24, 200, generator=g), torch.randn(900, 200, generator=g)
    x[:, 1:] += 0.8 * x[:, :-1]
    config = QuantConfig(bits=2, group_size=group)
    factor, _ = factorise(x.T @ x / len(x), config)
    linear = round_to_grid(W, factor, config)

    def loss(now) -> float:
        E = (W - dequantize(now)).double()
        return float(((E @ factor.damped.double()) * E).sum())

    losses = [loss(linear)]
    for _ in range(3):
        linear = descend(W, factor.damped, linear, config.max_code)
        losses.append(loss(linear))
    assert losses[1] < losses[0]
    assert all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(losses))
