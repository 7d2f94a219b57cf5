"""What calibration multiplies in: 16-bit factors where a device is fastest with them, sums always in float32.

Residuals, norms, rotations and activation functions stay float32; only what goes into a matrix product is
rounded. `benchmarks/gpu_precision.py` measures what that costs in KL.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

SLAB = {"cpu": 192, "cuda": 2048}  # columns at a time of a symmetric product


def matmul_dtype(device: torch.device) -> torch.dtype:
    """The type of a product's factors: bfloat16 on a GPU, and on a CPU that has it, else float32."""
    if device.type == "cuda":
        return torch.bfloat16
    from llvmlite.binding import get_host_cpu_features

    return torch.bfloat16 if get_host_cpu_features().get("avx512bf16") else torch.float32


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., K) times weight (N, K) transposed -> (..., N) float32; both factors of weight's dtype."""
    factor = x.to(weight.dtype)
    if x.device.type == "cuda" and weight.dtype.itemsize == 2:
        flat = torch.mm(factor.reshape(-1, x.shape[-1]), weight.T, out_dtype=torch.float32)
        return flat.view(*x.shape[:-1], len(weight))
    return nn.functional.linear(factor, weight).float()


def add_products(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total (A, B) float32 += left^T right, left (T, A), right (T, B): 16-bit factors on a GPU as they come."""
    if total.device.type == "cuda" and left.dtype.itemsize == 2:
        torch.addmm(total, left.T, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.float().T, right.float())


def precise_product(x: Tensor, h: Tensor) -> Tensor:
    """x (N, K) times h (K, M), float32 in and out, to float32's precision: on a GPU by three TF32 products.

    Each factor is the sum of two TF32 numbers, 21 bits; the product of both remainders is left out.
    """
    if x.device.type != "cuda":
        return x @ h
    if not _halves_work(x.device):
        return x @ h
    x_high, x_low = halves(x)
    h_high, h_low = halves(h)
    return _product_of_halves(x_high, x_low, h_high, h_low)


def _product_of_halves(x_high: Tensor, x_low: Tensor, h_high: Tensor, h_low: Tensor) -> Tensor:
    with tensor_cores():
        return (x_low @ h_high).addmm_(x_high, h_low).addmm_(x_high, h_high)


@functools.cache
def _halves_work(device: torch.device) -> bool:
    """Whether this GPU's products of halves are as good as they should be: tried once, before they count."""
    g = torch.Generator(device).manual_seed(0)
    x, h = (torch.randn(256, 256, generator=g, device=device) for _ in range(2))
    exact = x.double() @ h.double()
    error = (_product_of_halves(*halves(x), *halves(h)).double() - exact).norm() / exact.norm()
    return bool(error < 1e-5)


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 as a TF32 number, which has the first 10 bits of the mantissa, and what is left."""
    high = (x.view(torch.int32) & -(1 << 13)).view(torch.float32)
    return high, x - high


@contextmanager
def tensor_cores() -> Iterator[None]:
    """Float32 products within use TF32 on a GPU: 10 bits of each factor, sums in float32."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before
