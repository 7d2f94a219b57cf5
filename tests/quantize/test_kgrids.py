"""Grids of GGUF types: what is fitted is what is stored, and beats the plain encoder; solving beats rounding."""

import gguf
import numpy as np
import pytest
import torch

from quantmill.formats import gguf as formats
from quantmill.formats.gguf import TYPES
from quantmill.quantize.gguf_solve import (
    fed_back,
    refit_blocks,
    round_to_nearest,
    solve_blocks,
    solve_towards,
)
from quantmill.quantize.gguf_step import to_bytes
from quantmill.quantize.kgrids import dequantize, fit
from quantmill.quantize.solver import factorise, relative_loss
from quantmill.types import QuantConfig

WRITTEN = [t for t in TYPES if t != "IQ4_NL"]


def weights(rows: int = 24, columns: int = 512) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(rows, columns, generator=generator) * (0.2 + torch.rand(rows, 1, generator=generator))


def hessian(columns: int = 512) -> torch.Tensor:
    generator = torch.Generator().manual_seed(6)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + 0.5 * torch.eye(columns)
    x = torch.randn(3000, columns, generator=generator) * torch.rand(columns, generator=generator) @ mixing
    return x.T @ x / len(x)


@pytest.mark.parametrize("name", WRITTEN)
def test_what_was_solved_is_what_the_gguf_package_reads(name: str) -> None:
    kind, W = TYPES[name], weights()
    factor, _ = factorise(hessian(), QuantConfig())
    linear = solve_blocks(W, factor, kind)
    raw = to_bytes(linear).numpy()
    theirs = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])
    assert torch.equal(torch.from_numpy(theirs), linear.weight)


@pytest.mark.parametrize("name", WRITTEN)
def test_feedback_beats_rounding_to_nearest(name: str) -> None:
    kind, W, H = TYPES[name], weights(), hessian()
    factor, _ = factorise(H, QuantConfig())
    solved, nearest = solve_blocks(W, factor, kind), round_to_nearest(W, kind)
    assert relative_loss(W, solved.weight, H) < 0.8 * relative_loss(W, nearest.weight, H)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_fitting_beats_the_plain_encoder(name: str) -> None:
    kind, W = TYPES[name], weights()
    plain = gguf.quants.quantize(W.numpy(), gguf.GGMLQuantizationType[name])
    theirs = (torch.from_numpy(formats.dequantize(kind, plain)) - W).square().sum()
    ours = (round_to_nearest(W, kind).weight - W).square().sum()
    assert float(ours) < 1.0001 * float(theirs)


@pytest.mark.parametrize("name", [t for t in WRITTEN if TYPES[t].is_k])
def test_integers_stay_in_range_and_minima_are_not_positive(name: str) -> None:
    kind = TYPES[name]
    for W in (weights(), weights().abs(), -weights().abs(), weights() * 0):
        grid = fit(W, torch.ones(512), kind)
        assert kind.scale_range is not None
        assert grid.scales is not None
        low, high = kind.scale_range
        assert low <= int(grid.scales.min())
        assert int(grid.scales.max()) <= high
        assert bool(torch.isfinite(grid.scale).all())
        if kind.has_min:
            assert grid.mins is not None
            assert int(grid.mins.min()) >= 0
            assert int(grid.mins.max()) <= high


def test_a_group_of_zeros_stays_zero() -> None:
    W = weights()
    W[:, 64:96] = 0
    for name in WRITTEN:
        linear = round_to_nearest(W, TYPES[name])
        assert float(linear.weight[:, 64:96].abs().max()) < 1e-2, name


@pytest.mark.parametrize("name", WRITTEN)
def test_refitting_never_raises_the_loss(name: str) -> None:
    W, H = weights(), hessian()
    linear = round_to_nearest(W, TYPES[name])
    after = refit_blocks(W, H, linear)
    assert relative_loss(W, after.weight, H) <= relative_loss(W, linear.weight, H)
    assert torch.equal(after.codes, linear.codes)


def test_costly_columns_are_kept_better() -> None:
    kind, W = TYPES["Q2_K"], weights(64)
    cost = torch.ones(512)
    cost[::8] = 100
    even, weighted = fit(W, torch.ones(512), kind), fit(W, cost, kind)

    def error(grid) -> float:
        scale, offset = (t.repeat_interleave(kind.group, 1) for t in (grid.scale, grid.offset))
        safe = torch.where(scale == 0, torch.full_like(scale, 1e-30), scale)
        codes = ((W - offset) / safe).round().clamp(0, kind.max_code).to(torch.uint8)
        return float(((dequantize(grid, codes) - W).square() * cost).sum())

    assert error(weighted) < error(even)


def test_ours_and_numpy_agree_on_values() -> None:
    linear = round_to_nearest(weights(), TYPES["Q4_K"])
    raw = to_bytes(linear).numpy()
    assert np.array_equal(formats.dequantize(TYPES["Q4_K"], raw), linear.weight.numpy())


@pytest.mark.parametrize("name", ["Q4_0", "Q2_K"])
def test_a_step_is_kept_only_if_the_judge_agrees(name: str) -> None:
    kind, W, H = TYPES[name], weights(), hessian()
    factor, _ = factorise(H, QuantConfig())
    seen: list[float] = []

    def judge(Q: torch.Tensor) -> torch.Tensor:
        E = Q - W
        loss = ((E @ H) * E).sum(1)
        seen.append(float(loss.sum()))
        return loss

    linear, kept = solve_towards(W, factor, kind, judge, rounds=2)
    assert float(judge(linear.weight).sum()) == min(seen)
    assert 0 < kept <= 5
    unmoved, none = solve_towards(W, factor, kind, lambda Q: Q.new_zeros(len(Q)), rounds=2)
    assert none == 0
    assert torch.equal(unmoved.codes, fed_back(W, factor, kind).codes)
