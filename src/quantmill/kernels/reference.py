"""The slow twin of every kernel, on any device: dequantise, then one plain matrix product.

Two rows of the backend table. `reference` dequantises at every call and holds nothing but the packed
tensors; `dense` dequantises the same values once and keeps them. Bits 2, 3, 4, 8, v1 and v2, negative
scales, true `g_idx`, any K and N that the packing allows. Knows no bit layout (formats.gptq does) and no
model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from quantmill.formats.gptq import dequantize
from quantmill.kernels.backend import Backend, LinearSpec, free_bytes
from quantmill.types import PackedLinear

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SLICE_WEIGHTS = 1 << 22  # dequantised at once: 16 MB in fp32, a few times that while it is unpacked
DENSE_BYTES = 4 << 30  # never spend more than this on dense copies
DENSE_SHARE = 0.25  # nor more than this share of the memory that is free


def compute_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype that weights are dequantised to: the activations', but fp32 for fp16 on a CPU.

    A CPU without fp16 arithmetic converts at every step anyway; fp32 is exact and not slower.
    """
    return torch.float32 if (device.type, dtype) == ("cpu", torch.float16) else dtype


def output_slices(packed: PackedLinear) -> Iterator[tuple[int, int, PackedLinear]]:
    """(first, last, the packed linear of output rows first:last), each at most about SLICE_WEIGHTS weights.

    Cut at multiples of 32 rows, where every packing has a word boundary.
    """
    step = max(32, SLICE_WEIGHTS // packed.in_features // 32 * 32)
    for a in range(0, packed.out_features, step):
        b = min(a + step, packed.out_features)
        words = slice(a * packed.bits // 32, -(-b * packed.bits // 32))
        part = dataclasses.replace(
            packed,
            qweight=packed.qweight[:, a:b],
            qzeros=packed.qzeros[:, words],
            scales=packed.scales[:, a:b],
            bias=None,
            out_features=b - a,
        )
        yield a, b, part


def matmul(x: Tensor, packed: PackedLinear) -> Tensor:
    """x (rows, K) -> (rows, N) in x's dtype, bias added; holds one slice of dense weights at a time."""
    dtype = compute_dtype(x.device, x.dtype)
    inputs = x.to(dtype)
    y = torch.empty(x.shape[0], packed.out_features, dtype=x.dtype, device=x.device)
    for a, b, part in output_slices(packed):
        bias = None if packed.bias is None else packed.bias[a:b].to(dtype)
        y[:, a:b] = linear(inputs, dequantize(part, dtype), bias)
    return y


@dataclass(frozen=True, slots=True)
class DenseWeight:
    """A linear dequantised once: weight (N, K) and bias (N,) in the dtype that is computed in."""

    weight: Tensor
    bias: Tensor | None


def dense_weight(packed: PackedLinear, dtype: torch.dtype) -> DenseWeight:
    """Dequantise for activations of `dtype`: bit for bit the values that `matmul` multiplies by."""
    dtype = compute_dtype(packed.qweight.device, dtype)
    shape = (packed.out_features, packed.in_features)
    weight = torch.empty(shape, dtype=dtype, device=packed.qweight.device)
    for a, b, part in output_slices(packed):
        weight[a:b] = dequantize(part, dtype)
    return DenseWeight(weight, None if packed.bias is None else packed.bias.to(dtype))


def dense_matmul(x: Tensor, state: DenseWeight) -> Tensor:
    """x (rows, K) -> (rows, N) in x's dtype, bias added."""
    return linear(x.to(state.weight.dtype), state.weight, state.bias).to(x.dtype)


def _as_it_lies(packed: PackedLinear, dtype: torch.dtype) -> PackedLinear:
    return packed


def _reference_refusal(spec: LinearSpec, device: torch.device, dtype: torch.dtype, rows: int) -> str | None:
    if dtype in DTYPES:
        return None
    return f"activations are {dtype}, it takes {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}"


def _dense_refusal(spec: LinearSpec, device: torch.device, dtype: torch.dtype, rows: int) -> str | None:
    if dtype not in DTYPES:
        return _reference_refusal(spec, device, dtype, rows)
    if spec.kept_weights == 0:
        return "a dense copy pays only where the layer is kept"
    need = spec.kept_weights * compute_dtype(device, dtype).itemsize
    limit = min(DENSE_BYTES, int(free_bytes(device) * DENSE_SHARE))
    if need <= limit:
        return None
    return (
        f"dense weights take {need / 1e9:.2f} GB, the limit is {limit / 1e9:.2f} GB "
        f"({DENSE_SHARE:.0%} of what is free, at most {DENSE_BYTES / 1e9:.1f} GB)"
    )


REFERENCE = Backend(
    name="reference",
    summary="dequantises at every call, slow but always right",
    supports=_reference_refusal,
    prepare=_as_it_lies,
    matmul=matmul,
)
DENSE = Backend(
    name="dense",
    summary="dequantised once, kept in memory",
    supports=_dense_refusal,
    prepare=dense_weight,
    matmul=dense_matmul,
)
