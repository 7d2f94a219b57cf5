"""The rows of the backend table: torch tensors of every dtype, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from linears import Shape, random_linear

from quantmill.errors import BadRequest
from quantmill.formats.gptq import dequantize
from quantmill.kernels import front_door
from quantmill.kernels.backend import LinearSpec, spec_of
from quantmill.kernels.cpu.backend import CPU, CPU_EXACT


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]
)
def test_exact_row_takes_and_gives_the_dtype(dtype: torch.dtype, tolerance: float) -> None:
    packed = random_linear(Shape(40, 96, 32, ordered=True, bias=True), 4, False)
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = CPU_EXACT.matmul(x, CPU_EXACT.prepare(packed, dtype))
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert packed.bias is not None
    wanted = x.double() @ dequantize(packed, torch.float64).T + packed.bias.double()
    assert (y.double() - wanted).abs().max() < tolerance * wanted.abs().max()


def test_the_faster_row_is_near() -> None:
    packed = random_linear(Shape(64, 256, 64), 4, True)
    x = torch.randn(2, 256, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = CPU.matmul(x, CPU.prepare(packed, torch.float32))
    weight = dequantize(packed, torch.float64)
    wanted = x.detach().double() @ weight.T
    assert (y - wanted).abs().max() < 1e-4 * wanted.abs().max()
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    (y * weights).sum().backward()
    assert x.grad is not None
    assert (x.grad - weights.double() @ weight).abs().max() < 1e-4


def test_a_named_row_is_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(random_linear(Shape(16, 64, 32), 4, True), kept_weights=1024)
    cpu = torch.device("cpu")

    def chosen() -> str:
        return front_door.plan(spec, cpu, torch.float32)[0][1].name

    assert chosen() == "cpu"
    monkeypatch.setenv(front_door.VARIABLE, "cpu-exact")
    assert chosen() == "cpu-exact"
    front_door.force("dense")
    assert chosen() == "dense"
    front_door.force(None)
    monkeypatch.setenv(front_door.VARIABLE, "magic")
    with pytest.raises(BadRequest, match="no backend is called 'magic'"):
        chosen()


def test_refusals_say_why() -> None:
    spec: LinearSpec = spec_of(random_linear(Shape(16, 64, 32), 4, True), kept_weights=1024)
    cpu = torch.device("cpu")
    assert CPU.supports(spec, cpu, torch.float16, 1) is None
    assert "cuda" in (CPU.supports(spec, torch.device("cuda"), torch.float16, 1) or "")
    assert "float64" in (CPU.supports(spec, cpu, torch.float64, 1) or "")
    once = spec_of(random_linear(Shape(16, 64, 32), 4, True))
    assert "kept" in (CPU.supports(once, cpu, torch.float32, 1) or "")
