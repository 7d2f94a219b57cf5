"""The reference kernel against W in float64 by definition, over the formats and shapes that files hold."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from gptq_models import exact_weight, random_linear
from quantmill.formats.gptq import dequantize, pack
from quantmill.kernels import reference
from quantmill.types import CheckpointFormat, PackedLinear, QuantConfig

V1, V2 = CheckpointFormat.GPTQ, CheckpointFormat.GPTQ_V2
SHAPES = [(576, 576), (576, 1536), (64, 32), (96, 200)]


def make(k: int, n: int, config: QuantConfig, *, shuffled: bool = False, bias: bool = False):
    linear = random_linear(k, n, config, shuffled=shuffled)
    b = torch.randn(n).half() if bias else None
    return exact_weight(linear), pack(linear, config, b)


def check(packed: PackedLinear, exact: torch.Tensor, rows: int = 3) -> None:
    x = torch.randn(rows, packed.in_features, generator=torch.Generator().manual_seed(3))
    wanted = x.double() @ exact.T
    if packed.bias is not None:
        wanted += packed.bias.double()
    got = reference.matmul(x, packed)
    assert got.dtype == torch.float32
    assert got.shape == wanted.shape
    scale = (x.double().abs() @ exact.T.abs()).amax()
    assert (got - wanted).abs().amax() <= 1e-6 * scale


@pytest.mark.parametrize(("k", "n"), SHAPES)
@pytest.mark.parametrize("group", [128, 64, -1, 8])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_matches_float64(bits, group, k, n):
    exact, packed = make(k, n, QuantConfig(bits=bits, group_size=group))
    assert (packed.scales < 0).any()
    check(packed, exact)


@pytest.mark.parametrize(("sym", "form"), [(True, V1), (True, V2), (False, V1), (False, V2)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_both_zero_conventions(bits, sym, form):
    exact, packed = make(96, 64, QuantConfig(bits=bits, group_size=32, sym=sym, checkpoint_format=form))
    check(packed, exact)


@pytest.mark.parametrize("group", [128, 8, -1])
@pytest.mark.parametrize("bits", [3, 4])
def test_true_act_order_and_bias(bits, group):
    exact, packed = make(576, 96, QuantConfig(bits=bits, group_size=group), shuffled=True, bias=True)
    check(packed, exact)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_slices_do_not_show(monkeypatch, bits):
    exact, packed = make(96, 200, QuantConfig(bits=bits, group_size=64, sym=False), bias=True)
    monkeypatch.setattr(reference, "SLICE_WEIGHTS", 96 * 64)
    cuts = [(a, b) for a, b, _ in reference.output_slices(packed)]
    assert cuts == [(0, 64), (64, 128), (128, 192), (192, 200)]
    check(packed, exact)
    assert torch.equal(reference.dense_weight(packed, torch.float32).weight.double(), exact)


def test_dequantised_values_are_exact_then_rounded_once():
    exact, packed = make(64, 32, QuantConfig(bits=8, group_size=32))
    assert torch.equal(dequantize(packed, torch.float32).double(), exact)
    dense = reference.dense_weight(packed, torch.bfloat16).weight
    assert torch.equal(dense, exact.to(torch.bfloat16))


def test_float16_on_a_cpu_is_computed_in_float32():
    exact, packed = make(576, 64, QuantConfig(), bias=True)
    x = torch.randn(5, 576).half()
    got = reference.matmul(x, packed)
    wanted = (x.float() @ exact.float().T + packed.bias.float()).half()
    assert got.dtype == torch.float16
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", reference.DTYPES)
@pytest.mark.parametrize("rows", [1, 7])
def test_dense_gives_what_reference_gives(dtype, rows):
    _, packed = make(576, 96, QuantConfig(bits=4), bias=True)
    x = torch.randn(rows, 576).to(dtype)
    slow = reference.matmul(x, packed)
    kept = reference.dense_matmul(x, reference.dense_weight(packed, dtype))
    assert kept.dtype == slow.dtype == dtype
    assert torch.equal(kept, slow)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_on_a_gpu(bits, dtype):
    exact, packed = make(576, 96, QuantConfig(bits=bits, group_size=128), shuffled=True, bias=True)
    moved = dataclasses.replace(
        packed, **{s: getattr(packed, s).cuda() for s in ("qweight", "qzeros", "scales", "g_idx", "bias")}
    )
    dense = reference.dense_weight(moved, dtype)
    assert torch.equal(dense.weight.cpu(), exact.to(dtype))
    x = torch.randn(5, 576, device="cuda").to(dtype)
    got = reference.matmul(x, moved)
    assert torch.equal(got, reference.dense_matmul(x, dense))
    wanted = x.double().cpu() @ exact.to(dtype).double().T + packed.bias.double()
    torch.testing.assert_close(got.double().cpu(), wanted, rtol=2e-2, atol=2e-2)


def test_memory_stays_at_one_slice():
    """Dequantised weights never exceed a slice, whatever the layer."""
    _, packed = make(2048, 4096, QuantConfig(group_size=-1))
    parts = [part.in_features * part.out_features for _, _, part in reference.output_slices(packed)]
    assert sum(parts) == 2048 * 4096
    assert max(parts) <= reference.SLICE_WEIGHTS
