"""Grids: the numba kernel against its torch twin at and around group edges, and what any grid must guarantee."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantmill.quantize import grids_numba
from quantmill.quantize.grids import (
    ASYM,
    ASYM_V1,
    SYM,
    Grid,
    encode,
    fit_torch,
    round_fp16,
    shrink_factors,
    start,
)


def groups_of(
    w: torch.Tensor, c: torch.Tensor, size: int, bits: int, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = [
        fit_torch(w[:, i : i + size], c[i : i + size], 2**bits - 1, grid, shrink_factors(bits))
        for i in range(0, w.shape[1], size)
    ]
    return torch.stack([s for s, _ in pairs], 1), torch.stack([z for _, z in pairs], 1)


def error(w, c, size, bits, scales, zeros) -> torch.Tensor:
    total = torch.zeros(w.shape[0], dtype=torch.float64)
    for g, i in enumerate(range(0, w.shape[1], size)):
        part = w[:, i : i + size]
        q = encode(part, scales[:, g], zeros[:, g], 2**bits - 1)
        back = scales[:, g, None] * (q - zeros[:, g, None])
        total += ((part - back).double().square() * c[i : i + size]).sum(1)
    return total


@pytest.mark.parametrize("grid", [SYM, ASYM, ASYM_V1], ids=lambda g: g.name)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("k", "size"), [(8, 8), (15, 8), (16, 16), (17, 16), (64, 32), (65, 32), (100, 100)])
def test_numba_equals_torch(grid: Grid, bits: int, k: int, size: int) -> None:
    g = torch.Generator().manual_seed(k)
    w, c = torch.randn(37, k, generator=g), torch.rand(k, generator=g) ** 3 + 1e-4
    expected = groups_of(w, c, size, bits, grid)
    found = grids_numba.fit_groups(w, c, size, 2**bits - 1, grid, shrink_factors(bits))
    a, b = error(w, c, size, bits, *expected), error(w, c, size, bits, *found)
    assert torch.allclose(a, b, rtol=1e-4)
    assert (found[0] == expected[0]).float().mean() > 0.98  # the rest are ties of the objective
    assert torch.equal(found[0], found[0].half().float())
    assert (found[1] >= grid.lowest_zero).all()
    assert (found[1] <= 2**bits - 1).all()


def test_fp16_rounding_is_torchs() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3000, generator=g) * 10 ** torch.empty(3000).uniform_(-9, 6, generator=g)
    expected = round_fp16(x)
    found = torch.tensor([float(grids_numba.round_fp16.py_func(np.float32(v))) for v in x.numpy()])
    assert torch.equal(found, expected)
    assert (expected != 0).all()
    assert torch.isfinite(expected).all()


@pytest.mark.parametrize("grid", [SYM, ASYM], ids=lambda g: g.name)
def test_the_search_never_loses_to_the_grid_it_starts_from(grid: Grid) -> None:
    g = torch.Generator().manual_seed(0)
    w, c = torch.randn(64, 32, generator=g), torch.rand(32, generator=g) + 0.1
    scale, zero = start(w, 15, grid)
    plain = error(w, c, 32, 4, round_fp16(scale)[:, None], zero.round()[:, None])
    searched = fit_torch(w, c, 15, grid, shrink_factors(4))
    assert (error(w, c, 32, 4, searched[0][:, None], searched[1][:, None]) <= plain + 1e-6).all()


def test_the_symmetric_scale_is_signed_so_that_the_extreme_weight_is_code_zero() -> None:
    w = torch.tensor([[-1.0, 0.5, 0.25, 0.1], [1.0, -0.5, 0.25, 0.1]])
    scale, zero = fit_torch(w, torch.ones(4), 15, SYM, torch.tensor([1.0]))
    assert scale[0] > 0 > scale[1]
    assert (encode(w, scale, zero, 15)[:, 0] == 0).all()


def test_zeros_and_tiny_weights_have_a_usable_grid() -> None:
    w = torch.stack([torch.zeros(16), torch.full((16,), 1e-8), torch.full((16,), 3e4)])
    for grid in (SYM, ASYM):
        found = grids_numba.fit_groups(w, torch.ones(16), 16, 15, grid, shrink_factors(4))
        for scale in (found[0], fit_torch(w, torch.ones(16), 15, grid, shrink_factors(4))[0]):
            assert (scale != 0).all()
            assert torch.isfinite(scale).all()
