"""Two rows of the backend table: a packed linear on this processor, torch in and torch out.

`cpu` takes 15 bits of the activations, which costs nothing that can be measured; `cpu-exact` keeps fp32.
Knows no model. numba is imported when a linear is prepared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantmill.kernels.backend import Backend, LinearSpec
from quantmill.types import PackedLinear

if TYPE_CHECKING:
    from quantmill.kernels.cpu.layout import Precision
    from quantmill.kernels.cpu.linear import RunnableLinear

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _refusal(spec: LinearSpec, device: torch.device, dtype: torch.dtype, rows: int) -> str | None:
    if device.type != "cpu":
        return f"it runs on a CPU, the linear lies on {device.type}"
    if dtype not in DTYPES:
        return f"activations are {dtype}, it takes {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}"
    if spec.kept_weights == 0:
        return "repacking pays only where the layer is kept"
    return None


def _prepare(packed: PackedLinear, dtype: torch.dtype) -> RunnableLinear:
    from quantmill.kernels.cpu.layout import Precision

    return _runnable(packed, Precision.INT16)


def _prepare_exact(packed: PackedLinear, dtype: torch.dtype) -> RunnableLinear:
    from quantmill.kernels.cpu.layout import Precision

    return _runnable(packed, Precision.EXACT)


def _runnable(packed: PackedLinear, precision: Precision) -> RunnableLinear:
    from quantmill.kernels.cpu.linear import RunnableLinear
    from quantmill.kernels.cpu.packing import pack_linear

    return RunnableLinear(pack_linear(packed), precision=precision)


def matmul(x: Tensor, state: RunnableLinear) -> Tensor:
    """x (rows, K) -> (rows, N) in x's dtype, bias added. No gradient passes."""
    y = torch.from_numpy(state(x.detach().float().numpy()))
    return y.to(x.dtype).contiguous()


CPU = Backend(
    name="cpu",
    summary="numba, the processor's byte dot products, activations in 15 bits with a scale for every 32",
    supports=_refusal,
    prepare=_prepare,
    matmul=matmul,
)
CPU_EXACT = Backend(
    name="cpu-exact",
    summary="numba, fp32 activations, weights dequantised in registers",
    supports=_refusal,
    prepare=_prepare_exact,
    matmul=matmul,
)
