"""Preset best's solver on one group: the shift's algebra, choices by held-out loss, steps that only help."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quantmill.quantize.moments import Goal, Moments, pooled
from quantmill.quantize.presets import BEST
from quantmill.quantize.refine import choose_target, pull_of, shift_step, solve_best, usable_orders
from quantmill.quantize.solver import dequantize, solve_group
from quantmill.types import ActOrder, QuantConfig

N, K = 24, 64


class Case:
    """Inputs in two streams, fit and held-out tokens, weights."""

    def __init__(self, seed: int = 0, tokens: int = 1200, mismatch: float = 0.3) -> None:
        g = torch.Generator().manual_seed(seed)
        mix = torch.randn(K, K, generator=g) * 0.3 + torch.eye(K)
        self.W = torch.randn(N, K, generator=g)
        self.original = torch.randn(tokens, K, generator=g) @ mix
        drift = self.original @ (torch.randn(K, K, generator=g) * 0.1)
        self.x = self.original + mismatch * (drift + 0.3 * torch.randn(tokens, K, generator=g))
        self.gap = mismatch * torch.randn(tokens, N, generator=g)

    def goal(self, part: slice, gap: bool = False) -> Goal:
        m = Moments(K, torch.device("cpu"))
        for tokens in torch.arange(len(self.x))[part].split(100):
            m.add(self.x[tokens], self.original[tokens], self.gap[tokens] if gap else None)
        return m.goal(self.W)

    def error(self, Q: torch.Tensor, part: slice) -> float:
        wanted = self.original[part] @ self.W.T
        return float((wanted - self.x[part] @ Q.T).square().sum(1).mean())


FIT, HELD, TEST = slice(0, 700), slice(700, 900), slice(900, 1200)


@pytest.mark.parametrize("gap", [False, True])
def test_moments_are_the_means_they_claim(gap: bool) -> None:
    case = Case()
    goal = case.goal(FIT, gap)
    x, y = case.x[FIT].double(), case.original[FIT].double() @ case.W.T.double()
    y = y + case.gap[FIT] if gap else y
    assert torch.allclose(goal.H.double(), x.T @ x / 700, atol=1e-3)
    assert torch.allclose(goal.R.double(), y.T @ x / 700, atol=1e-3)
    Q = torch.randn(N, K)
    wanted = (y - x @ Q.T.double()).square().mean(0) - y.square().mean(0)
    assert torch.allclose(goal.loss(Q), wanted, rtol=1e-3, atol=1e-2)


def test_pooling_is_one_sum_over_all_tokens() -> None:
    case = Case()
    both, whole = pooled(case.goal(FIT), case.goal(HELD)), case.goal(slice(0, 900))
    assert both.tokens == whole.tokens == 900
    assert torch.allclose(both.H, whole.H, atol=1e-4)
    assert torch.allclose(both.R, whole.R, atol=1e-3)


def test_the_full_shift_is_the_least_squares_target() -> None:
    case = Case()
    goal = case.goal(FIT)
    T = case.W + shift_step(pull_of(case.W, goal), goal.H, 1e-6)
    x, y = case.x[FIT].double(), case.original[FIT].double() @ case.W.T.double()
    exact = torch.linalg.lstsq(x, y).solution.T
    assert torch.allclose(T.double(), exact, atol=2e-3)
    assert case.error(T, TEST) < case.error(case.W, TEST)


def test_no_mismatch_no_shift() -> None:
    case = Case(mismatch=0.0)
    goal = case.goal(FIT)
    assert float(shift_step(pull_of(case.W, goal), goal.H, 0.05).abs().max()) < 1e-3


def test_targets_are_chosen_per_module_on_held_out_tokens() -> None:
    case = Case()
    fit, judge = case.goal(FIT), case.goal(HELD)
    half = N // 2
    fit.R[half:] = (case.W[half:] @ fit.H) * 2 - fit.R[half:]  # a step that leads away is not taken
    recipe = replace(BEST, shifts=(0.0, 0.5, 1.0), shift_ridges=(0.01, 10.0))
    T, (first, second) = choose_target(case.W, [half, half], fit, judge, recipe)
    assert (first.strength, first.ridge) == (1.0, 0.01)
    assert second.strength == 0.0
    assert torch.equal(T[half:], case.W[half:])
    expected = case.W + shift_step(pull_of(case.W, fit), fit.H, 0.01)
    assert torch.equal(T[:half], expected[:half])


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("sym", [True, False])
def test_best_beats_fast_on_tokens_neither_has_seen(bits: int, sym: bool) -> None:
    case = Case()
    config = QuantConfig(bits=bits, group_size=32, sym=sym)
    goal = case.goal(FIT)
    [fast] = solve_group([case.W], case.goal(slice(0, 900)).H, config)
    first, second = solve_best([case.W[:10], case.W[10:]], goal, case.goal(HELD), config, BEST)
    assert "shift" in str(first.choice)
    best = torch.cat([dequantize(first.linear), dequantize(second.linear)])
    assert case.error(best, TEST) < 0.95 * case.error(dequantize(fast.linear), TEST)


def test_refinement_never_raises_the_judged_loss() -> None:
    case = Case()
    goal, judge = case.goal(FIT), case.goal(HELD)
    config = QuantConfig(bits=2, group_size=32)
    losses = []
    for rounds in (0, 1, 3):
        recipe = replace(BEST, damps=(0.05,), orders=("static",), rounds=rounds)
        [solved] = solve_best([case.W], goal, judge, config, recipe)
        losses.append(float(judge.loss(dequantize(solved.linear)).sum()))
    assert losses[0] >= losses[1] >= losses[2]
    assert losses[2] < losses[0]


def test_without_held_out_tokens_the_fit_tokens_judge() -> None:
    case = Case()
    [solved] = solve_best([case.W], case.goal(FIT), None, QuantConfig(bits=3, group_size=32), BEST)
    assert torch.isfinite(dequantize(solved.linear)).all()


def test_groups_stay_consecutive_whatever_the_order() -> None:
    case = Case()
    for order in ("static", "group-aware"):
        recipe = replace(BEST, orders=(order,))
        [solved] = solve_best([case.W], case.goal(FIT), case.goal(HELD), QuantConfig(3, 16), recipe)
        assert torch.equal(solved.linear.g_idx, (torch.arange(K) // 16).int())
        assert order in (solved.choice or "")


def test_orders_that_cannot_be_had_are_left_out() -> None:
    both = ("static", "group-aware")
    assert usable_orders(both, QuantConfig(group_size=32), 64) == both
    assert usable_orders(both, QuantConfig(group_size=32), 72) == ("static",)
    assert usable_orders(both, QuantConfig(group_size=32, act_order=ActOrder.GROUPED), 64) == ("as asked",)
