"""One row of the backend table: a packed linear on an NVIDIA GPU. Triton is imported when a linear is prepared.

Before the first linear of a kind is served, one small linear of that kind is multiplied on the GPU and compared
with the slow twin (proof.py does the same for each kernel and falls back); a kind that fails is refused, by name.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantmill.formats.gptq import dequantize
from quantmill.kernels.backend import Backend, LinearSpec
from quantmill.types import PackedLinear

if TYPE_CHECKING:
    from quantmill.kernels.triton.linear import RunnableLinear

DTYPES = (torch.float16, torch.bfloat16)
LOWEST = (8, 0)  # compute capability
CHECKED_ROWS = (1, 9, 40, 200)  # rows of x: a program of every kernel


def _refusal(spec: LinearSpec, device: torch.device, dtype: torch.dtype, rows: int) -> str | None:
    if device.type != "cuda" or torch.version.hip is not None:
        return f"it runs on an NVIDIA GPU, the linear lies on {device.type}"
    if dtype not in DTYPES:
        return f"activations are {dtype}, it takes {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}"
    if spec.kept_weights == 0:
        return "repacking pays only where the layer is kept"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if torch.cuda.get_device_capability(device) < LOWEST:
        return "the GPU's compute capability is below 8.0"
    return _self_test(spec.bits, not spec.sequential, dtype, device)


@functools.cache
def _self_test(bits: int, ordered: bool, dtype: torch.dtype, device: torch.device) -> str | None:
    """One small product of this kind beside its twin. Returns why the kind is refused, or None."""
    from quantmill.kernels.triton.proof import sample

    packed = sample(bits, 64, device, ordered=ordered)
    state = _prepare(packed, dtype)
    generator = torch.Generator(device).manual_seed(0)
    for rows in CHECKED_ROWS:
        x = torch.randn(rows, packed.in_features, device=device, generator=generator).to(dtype)
        wanted = x.float() @ dequantize(packed, torch.float32).T
        found = matmul(x, state)
        wrong = float((found.float() - wanted).norm() / wanted.norm())
        if not wrong < 0.01:
            return f"its self-test with {bits} bits failed on this GPU (error {wrong:.2g}): report it"
    return None


def _prepare(packed: PackedLinear, dtype: torch.dtype) -> RunnableLinear:
    from quantmill.kernels.triton.linear import RunnableLinear
    from quantmill.kernels.triton.packing import tile

    return RunnableLinear.of(tile(packed))


def matmul(x: Tensor, state: RunnableLinear) -> Tensor:
    """x (rows, K) -> (rows, N) in x's dtype, bias added. No gradient passes."""
    from quantmill.kernels.triton import linear

    return linear.matmul(x.detach(), state)


TRITON = Backend(
    name="triton",
    summary="codes straight to the tensor cores, sums in fp32; long prompts through a dense copy",
    supports=_refusal,
    prepare=_prepare,
    matmul=matmul,
)
