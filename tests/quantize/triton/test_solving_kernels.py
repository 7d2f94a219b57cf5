"""The GPU's solving kernels beside their slow twins, around tile edges: interpreted where there is no GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton.language", reason="triton is not installed")

from quantize.test_solver import problem
from quantmill.quantize import (
    columns_triton,
    descent_triton,
    grids_triton,
    machines,
    refit,
    refit_triton,
    solver,
)
from quantmill.quantize.columns import round_columns_torch
from quantmill.quantize.descent import descend_block_torch
from quantmill.quantize.grids import ASYM, ASYM_V1, SYM, Grid, encode, fit_groups_torch, shrink_factors
from quantmill.quantize.solver import dequantize
from quantmill.types import ActOrder, IntLinear, QuantConfig

BLOCKS = [(1, 1), (5, 7), (16, 16), (17, 33), (33, 127), (7, 128)]


def grid_of_block(n: int, k: int, bits: int, g: torch.Generator, device: torch.device):
    """Scales of either sign and zeros for a block, as views with strides of their own."""
    sign = torch.where(torch.rand(n, 1, generator=g) < 0.5, -1.0, 1.0)
    scale = ((torch.rand(n, 1, generator=g) + 0.1) * sign).expand(n, k)
    zero = torch.randint(0, 2**bits, (k, n), generator=g).float().T
    return scale.to(device), zero.to(device)


@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("n", "k"), BLOCKS)
def test_columns(device: torch.device, bits: int, n: int, k: int, by_columns: bool) -> None:
    g = torch.Generator().manual_seed(k)
    wide = torch.randn(n, 2 * k, generator=g).to(device)
    target, carried = wide[:, :k], 0.1 * wide[:, k:]
    feedback = (torch.randn(k, k, generator=g).triu(1) * 0.2 + torch.eye(k)).to(device)
    feedback = feedback.T.contiguous().T if by_columns else feedback  # as torch's Cholesky factors lie
    scale, zero = grid_of_block(n, k, bits, g, device)
    arguments = (target, carried, feedback, scale, zero, 2**bits - 1)
    codes, errors = round_columns_torch(*arguments)
    own_codes, own_errors = columns_triton.round_columns_triton(*arguments)
    rows = (codes == own_codes).all(1)  # a tie rounded the other way changes what follows it in that row
    assert rows.float().mean() > 0.9
    assert torch.allclose(errors[rows], own_errors[rows], atol=1e-5)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(("n", "k"), BLOCKS)
def test_descent(device: torch.device, bits: int, n: int, k: int) -> None:
    g = torch.Generator().manual_seed(k)
    x = torch.randn(3 * k, k, generator=g)
    H = (x.T @ x / len(x) + 0.1 * torch.eye(k)).to(device)
    scale, zero = grid_of_block(n, k, bits, g, device)
    current = torch.randn(n, k, generator=g).to(device)
    gradient = (0.3 * torch.randn(n, k, generator=g).to(device)) @ H
    arguments = (current, gradient, H, scale, zero, 2**bits - 1)
    codes, values = descend_block_torch(*arguments)
    own_codes, own_values = descent_triton.descend_block_triton(*arguments)
    rows = (codes == own_codes).all(1)
    assert rows.float().mean() > 0.9
    assert torch.allclose(values[rows], own_values[rows], atol=1e-5)


def grid_error(w, c, size, bits, scales, zeros) -> torch.Tensor:
    total = torch.zeros(len(w), dtype=torch.float64, device=w.device)
    for i, start in enumerate(range(0, w.shape[1], size)):
        part, s, z = w[:, start : start + size], scales[:, i], zeros[:, i]
        wrong = part - s[:, None] * (encode(part, s, z, 2**bits - 1) - z[:, None])
        total += (wrong.double().square() * c[start : start + size]).sum(1)
    return total


@pytest.mark.parametrize("grid", [SYM, ASYM, ASYM_V1], ids=lambda g: g.name)
@pytest.mark.parametrize(
    ("bits", "k", "size"), [(2, 17, 16), (3, 64, 64), (4, 65, 32), (4, 72, 24), (8, 40, 40)]
)
def test_grids(device: torch.device, grid: Grid, bits: int, k: int, size: int) -> None:
    g = torch.Generator().manual_seed(k)
    w = torch.randn(37, k, generator=g).to(device)
    c = (torch.rand(k, generator=g) ** 3 + 1e-4).to(device)
    w[3] = 0.0  # a row without weights
    arguments = (w, c, size, 2**bits - 1, grid, shrink_factors(bits))
    expected, found = fit_groups_torch(*arguments), grids_triton.fit_groups(*arguments)
    a, b = (grid_error(w, c, size, bits, *pair) for pair in (expected, found))
    assert torch.allclose(a, b, rtol=1e-4)
    assert (found[0] == expected[0]).float().mean() > 0.98  # the rest are ties of the objective
    assert torch.equal(found[0], found[0].half().float())
    assert (found[0] != 0).all()
    assert (found[1] >= grid.lowest_zero).all()


SHAPES = [(130, 96, 16), (5, 128, 128), (64, 200, 64), (33, 72, 24)]


@pytest.mark.parametrize(("n", "k", "size"), SHAPES)
def test_group_products(device: torch.device, n: int, k: int, size: int) -> None:
    g = torch.Generator().manual_seed(n)
    x = torch.randn(2 * k, k, generator=g)
    H = x.T @ x / len(x)
    sizes = [min(size, k - i) for i in range(0, k, size)]
    width = max(16, 1 << (size - 1).bit_length())
    place = refit.padded_places(sizes, width, torch.device("cpu"))
    codes = torch.randint(-15, 16, (n, k), generator=g)
    wide, H_wide = torch.zeros(n, len(sizes) * width), torch.zeros(len(sizes) * width, len(sizes) * width)
    wide[:, place] = codes.float()
    H_wide[place[:, None], place] = H
    spread = torch.nn.functional.one_hot(torch.arange(k) // size, len(sizes)).double()
    wanted = refit.group_products(H.double(), codes.double(), spread)
    parts = refit_triton.split(H_wide.to(device))
    found = refit_triton.group_products(parts, wide.bfloat16().to(device), width)
    assert float((found.cpu() - wanted).norm() / wanted.norm()) < 1e-6
    assert torch.equal(found, found.mT)


@pytest.mark.parametrize(("n", "k", "size"), [*SHAPES, (16, 64, 64)])
@pytest.mark.parametrize("shuffled", [False, True])
def test_refit_is_the_plain_ones(device: torch.device, n: int, k: int, size: int, shuffled: bool) -> None:
    g = torch.Generator().manual_seed(k)
    x = torch.randn(4 * k, k, generator=g) @ (torch.eye(k) + 0.2 * torch.randn(k, k, generator=g))
    H, W = (x.T @ x / len(x)).to(device), torch.randn(n, k, generator=g).to(device)
    g_idx = torch.arange(k) // size
    g_idx = g_idx[torch.randperm(k, generator=g)] if shuffled else g_idx
    scales, zeros = fit_groups_torch(W, torch.ones(k, device=device), size, 15, SYM, shrink_factors(4))
    g_idx = g_idx.to(device)
    codes = torch.clamp((W / scales[:, g_idx]).round() + 8, 0, 15).to(torch.uint8)
    linear = IntLinear(codes, scales.half(), zeros.to(torch.uint8), g_idx.int())
    by_group = torch.argsort(g_idx, stable=True)
    sizes = torch.bincount(g_idx).tolist()
    width = max(16, 1 << (max(sizes) - 1).bit_length())
    plain = refit._refit_plain(W, H, linear, by_group, 1e-3)
    fused = refit._refit_fused(W, H, linear, by_group, sizes, width, 1e-3)
    assert (plain == fused).float().mean() > 0.9  # float32 against float64: now and then a float16 step

    def loss(s: torch.Tensor) -> float:
        E = (W - dequantize(IntLinear(codes, s.half(), linear.zeros, linear.g_idx))).double()
        return float(((E @ H.double()) * E).sum())

    assert loss(fused) == pytest.approx(loss(plain), rel=1e-4)
    assert loss(fused) <= loss(scales)


def test_a_row_without_a_factor_keeps_its_scales() -> None:
    M = torch.stack([torch.eye(3), -torch.eye(3)])
    found = refit.best_scales_fast(M, torch.full((2, 3), 2.0), torch.ones(2, 3), 1e-3)
    assert torch.allclose(found[0], torch.full((3,), 2.0), rtol=2e-3)
    assert torch.equal(found[1], torch.ones(3))


def test_a_whole_linear_is_solved_as_with_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels where the solver uses them, with matrices laid out as it hands them over."""
    if torch.cuda.is_available():
        pytest.skip("tests/quantize/test_cuda.py does this on a GPU")
    kernels = machines.Machine(
        "triton",
        columns_triton.round_columns_triton,
        grids_triton.fit_groups,
        descent_triton.descend_block_triton,
        lambda width: width <= refit_triton.WIDEST,
    )
    W, H = problem(24, 96)
    for order in ActOrder:
        config = QuantConfig(bits=3, group_size=32, act_order=order)
        expected = solver.solve(W, H, config)
        with monkeypatch.context() as patch:
            for module in (solver, refit):
                patch.setattr(module, "machine_of", lambda device: kernels)
            found = solver.solve(W, H, config)
        assert found.loss == pytest.approx(expected.loss, rel=0.02)
        assert (found.linear.codes == expected.linear.codes).float().mean() > 0.8
