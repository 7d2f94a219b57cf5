"""A linear whose scales, and codes if asked, can be trained: what block tuning and distillation move.

Scales are trained as s (1 + d) with d starting at 0, so that one learning rate fits all of them. Norms are
trained alike. Codes are trained as real numbers in steps of the grid that start where they were solved; every
product sees them rounded, and the gradient passes as if it had not (straight through, Bengio et al. 2013,
arXiv:1308.3432). Memory: the codes as int8, or 16 bytes each where they are trained, and one dequantised
linear at a time; nothing of a linear's size is kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantmill.types import IntLinear

EDGE = 0.45  # of a step: so far from a code may its latent start, and still be rounded to it


@dataclass(frozen=True, slots=True)
class Grouping:
    """Which group each of K columns is in; `side`: columns of a group where all groups lie side by side, else 0.

    Side by side, as act order static leaves them, nothing is gathered or scattered; the last may be shorter.
    """

    of: Tensor  # (K,) int64
    groups: int
    side: int

    @classmethod
    def read(cls, g_idx: Tensor, groups: int) -> Grouping:
        of, side = g_idx.long(), int((g_idx == 0).sum())
        plain = side > 0 and torch.equal(of, torch.arange(len(of), device=of.device) // side)
        return cls(of, groups, side if plain else 0)

    def spread(self, values: Tensor) -> Tensor:
        """(N, groups) -> (N, K): every group's value in all of its columns."""
        if self.side:
            return values.repeat_interleave(self.side, 1)[:, : len(self.of)]
        return values[:, self.of]

    def sum(self, columns: Tensor) -> Tensor:
        """(N, K) -> (N, groups)."""
        if self.side:
            padded = nn.functional.pad(columns, (0, self.groups * self.side - len(self.of)))
            return padded.reshape(len(columns), self.groups, self.side).sum(-1)
        return columns.new_zeros(len(columns), self.groups).index_add_(1, self.of, columns)


class _Multiply(torch.autograd.Function):
    """y = x W^T with W = s[g] * round(latent), differentiable in x, s and, straight through, the latent codes."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scales: Tensor, latent: Tensor, groups: Grouping, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(x, scales, latent)
        ctx.groups, ctx.dtype = groups, dtype
        W = (groups.spread(scales) * _whole(latent)).to(dtype)
        return nn.functional.linear(x.to(dtype), W).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scales, latent = ctx.saved_tensors
        dy, centred, steps = grads[0].to(ctx.dtype), _whole(latent), ctx.groups.spread(scales)
        dx = (dy @ (steps * centred).to(ctx.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
        dW = (dy.flatten(0, -2).T @ x.to(ctx.dtype).flatten(0, -2)).float()
        ds = ctx.groups.sum(dW * centred)
        return dx, ds, dW * steps if ctx.needs_input_grad[2] else None, None, None


def _whole(latent: Tensor) -> Tensor:
    """Latent codes as they multiply: whole numbers."""
    return latent.round() if latent.is_floating_point() else latent


class ScaledLinear(nn.Module):
    """Stands in for a linear: zeros as solved, scales with a trainable relative change.

    With `max_code` the codes (0 to max_code) are trained, too: as `latent` (N, K) float32, less the zeros. They
    start at the codes, or `lean` of EDGE at most towards `origin`, the weights that the codes stand for.
    """

    def __init__(
        self,
        linear: IntLinear,
        bias: Tensor | None,
        dtype: torch.dtype,
        max_code: int | None = None,
        origin: Tensor | None = None,
        lean: float = 0.0,
    ) -> None:
        super().__init__()
        self.solved, self.dtype = linear, dtype
        self.groups = Grouping.read(linear.g_idx, linear.scales.shape[1])
        self.g = self.groups.of
        self.centred = (linear.codes.to(torch.int16) - linear.zeros.to(torch.int16)[:, self.g]).to(
            torch.int16
        )
        if int(self.centred.abs().max()) < 128:
            self.centred = self.centred.to(torch.int8)
        self.scales = linear.scales.float()
        self.bias = bias
        self.change = nn.Parameter(torch.zeros_like(self.scales))
        self.max_code, self.latent = max_code, None
        if max_code is not None:
            self.latent = nn.Parameter(self.centred.float())
            if lean and origin is not None:
                with torch.no_grad():
                    away = origin.to(self.latent) / self.scales[:, self.g] - self.latent
                    self.latent.add_(away.clamp_(-EDGE, EDGE), alpha=lean)
                    self.confine()

    def forward(self, x: Tensor) -> Tensor:
        multiply: Any = _Multiply.apply  # untyped in torch
        codes = self.centred if self.latent is None else self.latent
        y: Tensor = multiply(x, self.scales * (1 + self.change), codes, self.groups, self.dtype)
        return y if self.bias is None else y + self.bias

    def confine(self) -> None:
        """Bring latent codes back to the grid's ends: called after every step, so that none is lost beyond them."""
        if self.latent is not None and self.max_code is not None:
            zeros = self.groups.spread(self.solved.zeros.float())
            self.latent.copy_(torch.clamp(self.latent, -zeros, self.max_code - zeros))

    def stored(self) -> IntLinear:
        """The linear as it would be packed now; a scale that left float16's range keeps its old value."""
        new = (self.scales * (1 + self.change.detach())).half()
        usable = torch.isfinite(new) & (new != 0)
        old, codes = self.solved, self.solved.codes
        if self.latent is not None:
            codes = (self.latent.detach().round().to(torch.int16) + old.zeros.to(torch.int16)[:, self.g]).to(
                torch.uint8
            )
        return IntLinear(codes, torch.where(usable, new, old.scales), old.zeros, old.g_idx)


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
    root: nn.Module,
    linears: Mapping[str, IntLinear],
    norms: tuple[str, ...],
    dtype: torch.dtype,
    max_codes: Mapping[str, int] | None = None,
    lean: float = 0.0,
) -> Iterator[Trainable]:
    """`root` with the named linears and norms replaced for as long as the `with` lasts.

    With `max_codes`, the largest code of every linear, codes are trained, too, and start `lean` towards the weights
    that `root` has.
    """
    originals = {name: root.get_submodule(name) for name in (*linears, *norms)}
    new: Trainable = {
        n: ScaledLinear(
            q,
            _bias(originals[n]),
            dtype,
            max_codes[n] if max_codes else None,
            originals[n].get_parameter("weight"),
            lean,
        )
        for n, q in linears.items()
    }
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
