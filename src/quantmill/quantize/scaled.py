"""A linear with fixed codes whose scales can be trained: what block tuning and distillation move.

Scales are trained as s (1 + d) with d starting at 0, so that one learning rate fits all of them. Norms are
trained alike. Memory: the codes as int8 and one dequantised linear at a time; nothing of a linear's size is
kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quantmill.types import IntLinear


class _Multiply(torch.autograd.Function):
    """y = x W^T with W = s[g] * centred, differentiable in x and s."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scales: Tensor, centred: Tensor, g: Tensor, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(x, scales, centred, g)
        ctx.dtype = dtype
        W = (scales[:, g] * centred).to(dtype)
        return nn.functional.linear(x.to(dtype), W).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scales, centred, g = ctx.saved_tensors
        dy = grads[0].to(ctx.dtype)
        dx = (dy @ (scales[:, g] * centred).to(ctx.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
        dW = dy.flatten(0, -2).T @ x.to(ctx.dtype).flatten(0, -2)
        ds = torch.zeros_like(scales).index_add_(1, g, dW.float() * centred)
        return dx, ds, None, None, None


class ScaledLinear(nn.Module):
    """Stands in for a linear: codes and zeros as solved, scales with a trainable relative change."""

    def __init__(self, linear: IntLinear, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.solved, self.dtype = linear, dtype
        self.g = linear.g_idx.long()
        self.centred = (linear.codes.to(torch.int16) - linear.zeros.to(torch.int16)[:, self.g]).to(
            torch.int16
        )
        if int(self.centred.abs().max()) < 128:
            self.centred = self.centred.to(torch.int8)
        self.scales = linear.scales.float()
        self.bias = bias
        self.change = nn.Parameter(torch.zeros_like(self.scales))

    def forward(self, x: Tensor) -> Tensor:
        multiply: Any = _Multiply.apply  # untyped in torch
        y: Tensor = multiply(x, self.scales * (1 + self.change), self.centred, self.g, self.dtype)
        return y if self.bias is None else y + self.bias

    def stored(self) -> IntLinear:
        """The linear as it would be packed now; a scale that left float16's range keeps its old value."""
        new = (self.scales * (1 + self.change.detach())).half()
        usable = torch.isfinite(new) & (new != 0)
        old = self.solved
        return IntLinear(old.codes, torch.where(usable, new, old.scales), old.zeros, old.g_idx)


class ScaledNorm(nn.Module):
    """Stands in for a normalisation: its weight with a trainable relative change, rounded as it is stored."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.weight = norm.get_parameter("weight").detach().float()
        self.change = nn.Parameter(torch.zeros_like(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(self.norm, {"weight": self.weight * (1 + self.change)}, (x,))
        return out

    def stored(self) -> Tensor:
        """The weight as it would be written, float16 held in float32."""
        return (self.weight * (1 + self.change.detach())).half().float()


Trainable = dict[str, ScaledLinear | ScaledNorm]


@contextmanager
def trainable(
    root: nn.Module, linears: Mapping[str, IntLinear], norms: tuple[str, ...], dtype: torch.dtype
) -> Iterator[Trainable]:
    """`root` with the named linears and norms replaced for as long as the `with` lasts."""
    originals = {name: root.get_submodule(name) for name in (*linears, *norms)}
    new: Trainable = {n: ScaledLinear(q, _bias(originals[n]), dtype) for n, q in linears.items()}
    new |= {n: ScaledNorm(originals[n]) for n in norms}
    for name in new:
        _set(root, name, new[name])
    try:
        yield new
    finally:
        for name, module in originals.items():
            _set(root, name, module)


def _bias(linear: nn.Module) -> Tensor | None:
    bias = getattr(linear, "bias", None)
    return None if bias is None else bias.detach().float()


def norm_names(root: nn.Module) -> tuple[str, ...]:
    """Modules of `root` that have a one-dimensional weight and nothing else: its normalisations."""
    return tuple(
        name
        for name, module in root.named_modules()
        if [p for p, _ in module.named_parameters(recurse=False)] == ["weight"] and module.weight.dim() == 1
    )


def _set(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)
