"""Two rows of the backend table: a packed linear on this processor, torch in and torch out.

`cpu` takes 15 bits of the activations, which costs nothing that can be measured; `cpu-exact` keeps fp32.
Knows no model. numba is imported when a linear is prepared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from quantmill.formats.gptq import dequantize
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


@dataclass(frozen=True, slots=True)
class State:
    """A linear ready to run, and the file's tensors, for a gradient."""

    run: RunnableLinear
    packed: PackedLinear


def _prepare(packed: PackedLinear, dtype: torch.dtype) -> State:
    from quantmill.kernels.cpu.layout import Precision

    return _state(packed, Precision.INT16)


def _prepare_exact(packed: PackedLinear, dtype: torch.dtype) -> State:
    from quantmill.kernels.cpu.layout import Precision

    return _state(packed, Precision.EXACT)


def _state(packed: PackedLinear, precision: Precision) -> State:
    from quantmill.kernels.cpu.linear import RunnableLinear
    from quantmill.kernels.cpu.packing import pack_linear

    # As many threads as torch uses: a caller who limits torch means us too.
    run = RunnableLinear(pack_linear(packed), precision=precision, threads=torch.get_num_threads())
    return State(run, packed)


class _Product(torch.autograd.Function):
    """The product with the gradient of its input; packed weights have none."""

    @staticmethod
    def forward(context: Any, x: Tensor, state: State) -> Tensor:
        context.state = state
        return _product(x, state)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        weight = dequantize(context.state.packed, torch.float32)
        return (gradient.float() @ weight).to(gradient.dtype), None


def matmul(x: Tensor, state: State) -> Tensor:
    """x (rows, K) -> (rows, N) in x's dtype, bias added. A gradient goes to x."""
    if torch.is_grad_enabled() and x.requires_grad:
        return cast(Tensor, _Product.apply(x, state))  # type: ignore[no-untyped-call]
    return _product(x, state)


def _product(x: Tensor, state: State) -> Tensor:
    y = torch.from_numpy(state.run(x.detach().float().numpy()))
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
