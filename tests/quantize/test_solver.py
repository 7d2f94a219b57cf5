"""The solver against the textbook form of GPTQ in float64, against brute force, and at its edges."""

from __future__ import annotations

import itertools

import pytest
import torch

from quantmill.errors import BadCheckpoint
from quantmill.formats import gptq
from quantmill.quantize import solver
from quantmill.quantize.solver import (
    dequantize,
    factorise,
    fit_grids,
    refit,
    relative_loss,
    reversed_cholesky,
    solve,
    solve_group,
)
from quantmill.types import ActOrder, CheckpointFormat, QuantConfig


def problem(n: int, k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (n, k) and the Hessian of correlated inputs of very different size."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * k, k, generator=g) @ (torch.eye(k) + 0.3 * torch.randn(k, k, generator=g))
    x = x * torch.rand(k, generator=g).square() * 3
    return torch.randn(n, k, generator=g) * 0.05, x.T @ x / len(x)


def textbook_gptq(W, H, config, grid_of_group):
    """Frantar et al. 2022, algorithm 1, column by column in float64: damp, invert, Cholesky, subtract."""
    W, K = W.double().clone(), W.shape[1]
    damped = H.double() + config.damp_percent * H.double().diagonal().mean() * torch.eye(K)
    order = solver.solving_order(H.diagonal(), config)
    U = torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order]), upper=True)
    W, codes, size = W[:, order], torch.empty(W.shape), config.effective_group(K)
    static = config.act_order is ActOrder.STATIC
    for j in range(K):
        g = int(order[j]) // size if static else j // size
        scale, zero = grid_of_group(g, W, j)
        q = torch.clamp(torch.round(W[:, j] / scale) + zero, 0, config.max_code)
        codes[:, order[j]] = q.float()
        err = (W[:, j] - scale * (q - zero)) / U[j, j]
        W[:, j + 1 :] -= err[:, None] * U[j, j + 1 :]
    return codes


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("k", [16, 40, 130])
def test_static_order_gives_the_textbook_integers(bits: int, k: int) -> None:
    config = QuantConfig(bits=bits, group_size=16, damp_percent=0.05)
    W, H = problem(24, k)
    factor, _ = factorise(H, config)
    cost = torch.empty_like(factor.cost)
    cost[factor.order] = factor.cost
    scales, zeros = fit_grids(W, cost, config)
    expected = textbook_gptq(W, H, config, lambda g, *_: (scales[:, g].double(), zeros[:, g].double()))
    found = solver.round_to_grid(W, factor, config).codes
    assert (found.float() != expected).float().mean() < 2e-3  # float32 against float64, at ties only


@pytest.mark.parametrize("act_order", [ActOrder.NONE, ActOrder.GROUPED])
def test_grids_of_dynamic_orders_are_fitted_on_compensated_weights(act_order: ActOrder) -> None:
    config = QuantConfig(bits=4, group_size=16, act_order=act_order, damp_percent=0.05)
    W, H = problem(24, 56)
    factor, _ = factorise(H, config)
    grids: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def grid(g: int, compensated: torch.Tensor, j: int) -> tuple[torch.Tensor, torch.Tensor]:
        if g not in grids:
            columns = slice(j, min(j + 16, 56))
            s, z = fit_grids(compensated[:, columns].float(), factor.cost[columns].contiguous(), config)
            grids[g] = (s[:, 0].double(), z[:, 0].double())
        return grids[g]

    expected = textbook_gptq(W, H, config, grid)
    found = solver.round_to_grid(W, factor, config)
    assert (found.codes.float() != expected).float().mean() < 5e-3
    assert torch.allclose(found.scales[:, 0].double(), grids[0][0], rtol=1e-3)


def test_brute_force_agrees_where_columns_do_not_interact() -> None:
    config = QuantConfig(bits=2, group_size=8, damp_percent=1e-6)
    W, _ = problem(6, 8)
    H = torch.diag(torch.rand(8) + 0.5)
    factor, _ = factorise(H, config)
    linear = solver.round_to_grid(W, factor, config)
    step = linear.scales.float()
    choices = torch.tensor(list(itertools.product(range(4), repeat=8)), dtype=torch.float32)
    for row in range(6):
        errors = ((W[row] - step[row] * (choices - 2)).square() * H.diagonal()).sum(1)
        own = ((W[row] - step[row] * (linear.codes[row].float() - 2)).square() * H.diagonal()).sum()
        assert torch.isclose(own, errors.min(), rtol=1e-4)


def test_between_brute_force_and_rounding_to_nearest() -> None:
    config = QuantConfig(bits=2, group_size=8, damp_percent=0.01)
    W, H = problem(12, 8, seed=3)
    factor, _ = factorise(H, config)
    linear = solver.round_to_grid(W, factor, config)
    step = linear.scales.float()
    choices = torch.tensor(list(itertools.product(range(4), repeat=8)), dtype=torch.float32)
    best = nearest = 0.0
    for row in range(12):
        E = W[row] - step[row] * (choices - 2)
        best += float(((E @ factor.damped) * E).sum(1).min())
        e = W[row] - step[row] * (torch.clamp((W[row] / step[row]).round() + 2, 0, 3) - 2)
        nearest += float(e @ factor.damped @ e)
    E = W - dequantize(linear)
    own = float(((E @ factor.damped) * E).sum())
    assert best <= own * (1 + 1e-5)
    assert own < nearest


def test_reversed_cholesky() -> None:
    _, H = problem(1, 33)
    diagonal, order = H.diagonal().double() + 0.1, torch.randperm(33)
    L = reversed_cholesky(H, diagonal, order)
    assert L is not None
    V = L.flip(0, 1)
    assert torch.equal(V, V.triu())
    wanted = H.double()
    wanted.diagonal().copy_(diagonal)
    assert torch.allclose(V @ V.T, wanted[order][:, order], atol=1e-10)
    assert reversed_cholesky(torch.eye(3), -torch.ones(3).double(), torch.arange(3)) is None


SHAPES = [(8, 8, 8), (24, 40, 16), (16, 576, 128), (33, 130, 128), (16, 64, -1), (16, 64, 128)]


@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
@pytest.mark.parametrize("act_order", list(ActOrder))
@pytest.mark.parametrize(
    ("bits", "sym"), [(2, True), (3, False), (4, True), (4, False), (8, True), (8, False)]
)
def test_every_setting_beats_rounding_and_survives_packing(
    n: int, k: int, group: int, act_order: ActOrder, bits: int, sym: bool
) -> None:
    config = QuantConfig(bits=bits, group_size=group, act_order=act_order, sym=sym, damp_percent=0.05)
    W, H = problem(n, k)
    solution = solve(W, H, config)
    linear = solution.linear
    assert linear.scales.dtype == torch.float16
    assert torch.isfinite(linear.scales).all()
    assert (linear.scales != 0).all()
    assert int(linear.codes.max()) <= config.max_code
    assert sorted(set(linear.g_idx.tolist())) == list(range(config.groups(k)))
    if act_order is not ActOrder.GROUPED:
        assert torch.equal(linear.g_idx.long(), torch.arange(k) // config.effective_group(k))
    packed = gptq.pack(linear, config)
    assert torch.equal(gptq.dequantize(packed, torch.float32), dequantize(linear))
    nearest = _nearest(W, config)
    assert solution.loss < relative_loss(W, nearest, H)
    assert solution.fallback is None


def _nearest(W: torch.Tensor, config: QuantConfig) -> torch.Tensor:
    """Rounding to nearest on min-max grids of consecutive columns."""
    out = torch.empty_like(W)
    size = config.effective_group(W.shape[1])
    for i in range(0, W.shape[1], size):
        w = W[:, i : i + size]
        if config.sym:
            scale, zero = (
                2 * w.abs().amax(1, keepdim=True) / config.max_code,
                torch.tensor(float(config.sym_zero)),
            )
        else:
            low, high = w.amin(1, keepdim=True).clamp_max(0), w.amax(1, keepdim=True).clamp_min(0)
            scale = (high - low) / config.max_code
            zero = (-low / scale).round()
        out[:, i : i + size] = scale * (torch.clamp((w / scale).round() + zero, 0, config.max_code) - zero)
    return out


def test_asymmetric_v1_never_uses_zero_point_zero() -> None:
    W, H = problem(32, 64)
    config = QuantConfig(bits=4, group_size=16, sym=False, checkpoint_format=CheckpointFormat.GPTQ)
    linear = solve(W.abs(), H, config).linear  # all positive: the natural zero point is 0
    assert int(linear.zeros.min()) == 1


def test_linears_that_share_inputs_are_solved_as_if_alone() -> None:
    config = QuantConfig(bits=3, group_size=32)
    W, H = problem(48, 64)
    parts = list(W.split([32, 8, 8]))
    for part, solution in zip(parts, solve_group(parts, H, config), strict=True):
        alone = solve(part, H, config)
        assert torch.equal(solution.linear.codes, alone.linear.codes)
        assert torch.allclose(solution.linear.scales.float(), alone.linear.scales.float(), rtol=2e-3)
        assert solution.loss == pytest.approx(alone.loss, rel=1e-3)


def test_refit_lowers_the_loss_and_keeps_signs() -> None:
    config = QuantConfig(bits=3, group_size=16)
    W, H = problem(32, 64)
    factor, _ = factorise(H, config)
    before = solver.round_to_grid(W, factor, config)
    after = refit(W, factor.damped, before)
    assert relative_loss(W, dequantize(after), factor.damped) < relative_loss(
        W, dequantize(before), factor.damped
    )
    assert torch.equal(after.scales.sign(), before.scales.sign())
    assert torch.equal(after.codes, before.codes)


def test_a_row_of_zeros_stays_zero() -> None:
    W, H = problem(8, 32)
    W[3] = 0
    solution = solve(W, H, QuantConfig(bits=4, group_size=16))
    assert dequantize(solution.linear)[3].abs().max() < 1e-6


def test_an_input_that_never_fires_is_rounded_to_nearest() -> None:
    W, H = problem(8, 32)
    H[:, 5] = H[5, :] = 0
    linear = solve(W, H, QuantConfig(bits=8, group_size=32)).linear
    assert (dequantize(linear)[:, 5] - W[:, 5]).abs().max() <= linear.scales.float().abs().max()


def test_more_damping_is_used_and_reported_where_the_hessian_is_not_positive_definite() -> None:
    W, H = problem(8, 32)
    H = (
        H
        - 1.2 * torch.linalg.eigvalsh(H.double())[0].float() * torch.eye(32)
        - 0.2 * H.diagonal().mean() * torch.eye(32)
    )
    solution = solve(W, H, QuantConfig(bits=4, group_size=16, damp_percent=0.01))
    assert solution.damp_percent > 0.01
    assert solution.fallback is not None
    assert "damping" in solution.fallback


@pytest.mark.parametrize("H", [torch.zeros(16, 16), -torch.eye(16)])
def test_a_useless_hessian_means_rounding_to_nearest_and_says_so(H: torch.Tensor) -> None:
    W, _ = problem(8, 16)
    solution = solve(W, H, QuantConfig(bits=4, group_size=16))
    assert solution.fallback is not None
    assert "nearest" in solution.fallback
    assert (dequantize(solution.linear) - W).abs().max() <= solution.linear.scales.float().abs().max()


def test_nan_is_refused() -> None:
    W, H = problem(8, 16)
    bad = W.clone()
    bad[0, 0] = float("nan")
    with pytest.raises(BadCheckpoint, match="weights hold NaN"):
        solve(bad, H, QuantConfig(group_size=16))
    H[0, 0] = float("inf")
    with pytest.raises(BadCheckpoint, match="activations overflow"):
        solve(W, H, QuantConfig(group_size=16))
