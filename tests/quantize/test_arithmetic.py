"""Products of calibration: sums in float32, and TF32 halves that add up to the whole."""

from __future__ import annotations

import torch

from quantmill.quantize.arithmetic import add_products, halves, precise_product, product, tensor_cores


def test_halves_are_tf32_and_add_up() -> None:
    x = torch.randn(1000) * torch.logspace(-10, 10, 1000)
    high, low = halves(x)
    assert torch.equal(high + low, x)
    assert ((high.view(torch.int32) & 0x1FFF) == 0).all(), "ten bits of mantissa are left"
    assert (low.abs() <= x.abs() * 2**-10).all()


def test_three_products_of_halves_are_the_product() -> None:
    x, h = torch.randn(40, 60), torch.randn(60, 30)
    (a, b), (c, d) = halves(x), halves(h)
    wanted = x.double() @ h.double()
    assert torch.allclose((b @ c + a @ d + a @ c).double(), wanted, atol=1e-4)
    assert torch.allclose(precise_product(x, h).double(), wanted, atol=1e-4)


def test_sums_are_float32_whatever_the_factors() -> None:
    x, w = torch.randn(3, 7, 16), torch.randn(5, 16)
    assert product(x, w).dtype == torch.float32
    assert product(x, w.bfloat16()).dtype == torch.float32
    assert torch.allclose(product(x, w), x @ w.T, atol=1e-5)
    total = torch.ones(16, 5)
    add_products(total, x.reshape(-1, 16), torch.ones(21, 5))
    assert torch.allclose(total, 1 + x.reshape(-1, 16).sum(0)[:, None].expand(16, 5), atol=1e-4)


def test_tensor_cores_are_asked_for_within_only() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    with tensor_cores():
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert torch.backends.cuda.matmul.fp32_precision == before
