"""A decode step with five kernels a layer: norms, residuals and gates are done at the linears' ends.

What a linear reads is residual * gain * scale, fp16 or bf16; the norm's factor, one number a row, is multiplied
into its result, from sums of squares that the linear before has left. `scale` is a power of two, chosen from the
residuals of a few tokens when the model is opened: a value may be four million times larger than is typical there
before it is cut off at fp16's largest, and 200 000 times smaller before it is lost.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantmill.runtime.gpu import ops
from quantmill.runtime.gpu.layers import Attention, Model
from quantmill.runtime.gpu.projection import FEW, Projection
from quantmill.runtime.gpu.tensors import Gains

if TYPE_CHECKING:
    from quantmill.kernels.triton.ends import End, Norm
    from quantmill.kernels.triton.linear import RunnableLinear

TYPICAL = 2.0**-6  # of what a linear reads, before its norm
COLUMNS = 16  # of the residual that one sum of squares is of


def can_fuse(model: Model) -> bool:
    """Whether every linear of the blocks is one quantised linear that takes x in its order."""
    weights = model.weights
    every = [p for b in weights.blocks for p in b.projections]
    single = all(
        len(p.parts) == 1 and p.parts[0].packed is not None and p.parts[0].order is None for p in every
    )
    head = len(weights.head.parts) == 1 and weights.head.parts[0].order is None
    return (
        single and head and weights.embedding.shape[1] % COLUMNS == 0 and _has_ends(weights.embedding.device)
    )


def _has_ends(device: torch.device) -> bool:
    if importlib.util.find_spec("quantmill.kernels.triton.ends") is None:
        return False
    from quantmill.kernels.triton.linear import has_gluon

    return bool(has_gluon(device))


def with_gains(model: Model, sizes: list[float]) -> Model:
    """The model ready for `fused_states`. sizes: the typical size of the residual at every norm, in their order."""
    weights = model.weights
    gains = [g for b in weights.blocks for g in (b.attention_norm, b.mlp_norm)] + [weights.norm]
    fused = []
    for gain, size in zip(gains, sizes, strict=True):
        typical = max(size * float(gain.square().mean().sqrt()), 1e-20)
        fused.append(Gains(gain, model.epsilon, 2.0 ** round(math.log2(TYPICAL / typical))))
    return replace(model, fused=tuple(fused))


def fused_states(model: Model, tokens: Tensor, attention: Attention) -> tuple[Tensor, Tensor]:
    """Token ids (rows,) int32 -> what the head reads, not yet normed (rows, places), and its sums of squares."""
    from quantmill.kernels.triton.ends import Gated, Plain, Residual

    weights, device, kind = model.weights, tokens.device, model.dtype
    rows, hidden = tokens.shape[0], weights.embedding.shape[1]
    residual = torch.empty(rows, hidden, dtype=torch.float32, device=device)
    squares = torch.empty(rows, hidden // COLUMNS, dtype=torch.float32, device=device)
    norm, projection = model.fused[0], weights.blocks[0].qkv
    x = _buffer(model, rows, projection)
    ops.start(residual, weights.embedding, tokens, norm, projection.place_of, x, squares)
    for i, block in enumerate(weights.blocks):
        qkv = torch.empty(rows, projection.outputs, dtype=kind, device=device)
        _product(x, _linear(projection), Plain(qkv), norm=_norm(norm, squares, hidden))
        mixed = _buffer(model, rows, block.output)
        after = model.caches[i + 1] if i + 1 < len(model.caches) else None
        attention(qkv, model.heads[i], model.caches[i], block.output.place_of, mixed, after)
        norm, projection = model.fused[2 * i + 1], block.gate_up
        x = _buffer(model, rows, projection)
        end = Residual(residual, x, norm.gain, squares, projection.place_of, 1.0, norm.scale)
        _product(mixed, _linear(block.output), end)
        inner = _buffer(model, rows, block.down)
        _product(
            x, _linear(projection), Gated(inner, None, 1 / block.shrink), norm=_norm(norm, squares, hidden)
        )
        last = i + 1 == len(weights.blocks)
        norm, projection = model.fused[2 * i + 2], weights.head if last else weights.blocks[i + 1].qkv
        x = _buffer(model, rows, projection)
        end = Residual(residual, x, norm.gain, squares, projection.place_of, block.shrink, norm.scale)
        _product(inner, _linear(block.down), end)
    return x, squares


def fused_logits(model: Model, x: Tensor, squares: Tensor) -> Tensor:
    """What `fused_states` gave -> logits (rows, vocab) float32."""
    from quantmill.kernels.triton.ends import Plain

    (head,) = model.weights.head.parts
    logits = torch.empty(x.shape[0], head.outputs, dtype=torch.float32, device=x.device)
    norm = model.fused[-1]
    if head.packed is not None:
        hidden = model.weights.embedding.shape[1]
        _product(x, head.packed, Plain(logits), norm=_norm(norm, squares, hidden))
    else:
        assert head.weight is not None
        ops.dense(x, head.weight, head.bias, logits, squares=squares, norm=norm)
    return logits


def normed(model: Model, x: Tensor, squares: Tensor) -> Tensor:
    """What `fused_states` gave -> states after the last norm."""
    norm, hidden = model.fused[-1], model.weights.embedding.shape[1]
    factors = torch.rsqrt(squares.sum(1, keepdim=True) / hidden + norm.epsilon) / norm.scale
    return (x.float() * factors).to(x.dtype)


def _product(x: Tensor, linear: RunnableLinear, end: End, *, norm: Norm | None = None) -> None:
    """The product, so many rows at a time as the kernel takes; a row's bits do not depend on how many there are."""
    from quantmill.kernels.triton.linear import few_product

    if x.shape[0] <= FEW:
        few_product(x, linear, end, norm=norm)
        return
    for begin in range(0, x.shape[0], FEW):
        at = slice(begin, begin + FEW)
        some = None if norm is None else replace(norm, squares=norm.squares[at])
        few_product(x[at], linear, _rows_of(end, at), norm=some)


def _rows_of(end: End, at: slice) -> End:
    from quantmill.kernels.triton.ends import Residual

    if isinstance(end, Residual):
        return replace(end, residual=end.residual[at], after=end.after[at], squares=end.squares[at])
    return replace(end, out=end.out[at])


def _linear(projection: Projection):  # type: ignore[no-untyped-def]  # a RunnableLinear
    return projection.parts[0].packed


def _norm(norm: Gains, squares: Tensor, hidden: int):  # type: ignore[no-untyped-def]  # a Norm
    from quantmill.kernels.triton.ends import Norm

    return Norm(squares, hidden, norm.epsilon, norm.scale)


def _buffer(model: Model, rows: int, projection: Projection) -> Tensor:
    """What a projection reads. Zeros where its order has places that nothing fills."""
    make = torch.zeros if projection.holes else torch.empty
    return make(rows, projection.places, dtype=model.dtype, device=model.weights.embedding.device)
