"""The making lane on a GPU: the same job, the same losses as on the CPU. Skips without one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantize.test_pipeline import job, run, source
from quantize.test_solver import problem
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
