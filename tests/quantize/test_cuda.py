"""The making lane on a GPU: the same job, the same losses as on the CPU. Skips without one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantize.test_awq_best import divergence
from quantize.test_pipeline import job, run, source
from quantize.test_refine import FIT, HELD, Case
from quantize.test_solver import problem
from quantmill.quantize import pipeline
from quantmill.quantize.arithmetic import precise_product
from quantmill.quantize.hessian import Hessian
from quantmill.quantize.memory import RESIDENCES, Residence
from quantmill.quantize.moments import Goal
from quantmill.quantize.presets import BEST
from quantmill.quantize.refine import solve_best
from quantmill.quantize.solver import factorise, solve
from quantmill.types import ActOrder, QuantConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")


@pytest.mark.parametrize("act_order", list(ActOrder))
@pytest.mark.parametrize(("bits", "sym"), [(2, True), (3, False), (4, True), (8, True)])
def test_a_linear_is_solved_as_on_the_cpu(act_order: ActOrder, bits: int, sym: bool) -> None:
    config = QuantConfig(bits=bits, group_size=32, act_order=act_order, sym=sym)
    W, H = problem(48, 200)
    here, there = solve(W, H, config), solve(W.cuda(), H.cuda(), config)
    assert there.linear.codes.is_cuda
    first = factorise(H, config)[0].order[:16]  # a tie rounded the other way changes what follows in a row
    assert (here.linear.codes == there.linear.codes.cpu())[:, first].float().mean() > 0.9
    assert there.loss == pytest.approx(here.loss, rel=0.02)


def test_a_whole_run(tmp_path: Path) -> None:
    src = source(tmp_path / "src", "mistral")
    here, _ = run(job(src, tmp_path / "cpu", "4bit-32g", "8bit-32g"))
    there, _ = run(job(src, tmp_path / "gpu", "4bit-32g", "8bit-32g", device="cuda"))
    for a, b in zip(here, there, strict=True):
        for x, y in zip(a.modules, b.modules, strict=True):
            assert y.loss == pytest.approx(x.loss, rel=0.15)
            assert y.fallback is None


@pytest.mark.parametrize(("n", "k"), [(5, 40), (64, 300)])
def test_products_of_halves_are_as_good_as_float32(n: int, k: int) -> None:
    g = torch.Generator().manual_seed(k)
    x, h = torch.randn(n, k, generator=g), torch.randn(k, k, generator=g)
    exact = x.double() @ h.double()
    found = precise_product(x.cuda(), h.cuda()).cpu().double()
    assert float((found - exact).norm() / exact.norm()) < 3e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_hessian_is_the_sum_of_what_came_in(dtype: torch.dtype) -> None:
    x = torch.randn(500, 300, generator=torch.Generator().manual_seed(0)).cuda().to(dtype)
    hessian = Hessian(300, x.device)
    hessian.slab = 128  # slabs of unequal width
    for part in x.split(170):
        hessian.add(part)
    exact = x.double().T @ x.double() / 500
    assert float((hessian.mean().double() - exact).norm() / exact.norm()) < 1e-5
    assert torch.equal(hessian.mean(), hessian.mean().T)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_preset_best_solves_a_group_as_on_the_cpu(bits: int) -> None:
    case, config = Case(), QuantConfig(bits=bits, group_size=32)

    def solved(device: str) -> list[float]:
        fit, held = (
            Goal(goal.H.to(device), goal.R.to(device), goal.tokens)
            for goal in (case.goal(FIT), case.goal(HELD))
        )
        return [s.loss for s in solve_best([case.W.to(device)], fit, held, config, BEST)]

    assert solved("cuda") == pytest.approx(solved("cpu"), rel=0.05)


def test_a_whole_run_of_preset_best(tmp_path: Path) -> None:
    src = source(tmp_path / "src", "qwen2")
    [here], _ = run(job(src, tmp_path / "cpu", "4bit-32g", preset="best"))
    [there], _ = run(job(src, tmp_path / "gpu", "4bit-32g", preset="best", device="cuda"))
    assert not any(y.fallback for y in there.modules)
    for x, y in zip(here.modules[:3], there.modules[:3], strict=True):  # q, k, v, which nothing comes before
        assert y.loss == pytest.approx(x.loss, rel=0.05)
    # further on, 16-bit factors decide between shifts that are worth the same to four digits: a module's own loss
    # may then be several times the other's (a shift raises it), the model's output may not
    assert divergence(there.folder, src) == pytest.approx(divergence(here.folder, src), rel=0.2)


@pytest.mark.parametrize("preset", ["fast", "best"])
def test_every_way_to_spare_memory_finds_the_same(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src = source(tmp_path / "src", "mistral")
    losses = []
    for way in RESIDENCES:

        def only(*_: object, way: Residence = way, **__: object) -> Residence:
            return way

        monkeypatch.setattr(pipeline, "choose", only)
        [done], _ = run(job(src, tmp_path / way.name, "4bit-32g", preset=preset, device="cuda"))
        losses.append([m.loss for m in done.modules])
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-3)
