"""One pass through a model's layers, as a list of kernel calls. Knows no graph, no pages' owner, no sampling.

The residual is float32, so that no sum overflows; what linears read is fp16 or bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from quantmill.runtime.gpu import ops, prompts
from quantmill.runtime.gpu.projection import Projection
from quantmill.runtime.gpu.tensors import Gains, Heads, LayerCache, Rows, Scratch
from quantmill.runtime.gpu.weights import Weights

if TYPE_CHECKING:
    from quantmill.runtime.parallel.team import Team


@dataclass(frozen=True, slots=True)
class Model:
    """Weights, cache and what attention needs, on one device."""

    weights: Weights
    heads: tuple[Heads, ...]  # of every layer
    caches: tuple[LayerCache, ...]
    epsilon: float
    dtype: torch.dtype
    fused: tuple[
        Gains, ...
    ] = ()  # of all norms in their order, where steps can do without kernels between linears
    torch_prompts: bool = False  # whether torch's attention may serve prompts, where it is right
    alike: int = 0  # rows of a fused step that have the same bits; 0: not known
    team: Team | None = None  # the ranks over which what o and down give is summed


class Attention(Protocol):
    """Fills `out` (rows, places) from `qkv` and gives it, or a tensor like it; keys and values of the rows are in
    the cache afterwards. `following`: the next layer's cache, if it is known."""

    def __call__(
        self,
        qkv: Tensor,
        heads: Heads,
        cache: LayerCache,
        places_of: Tensor | None,
        out: Tensor,
        following: LayerCache | None = None,
    ) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Way:
    """How projections are multiplied: at once, and some rows and outputs after others."""

    product: Callable[[Projection, Tensor], Tensor]
    chunks: Callable[[Projection, Tensor], Iterable[tuple[tuple[slice, slice], Tensor]]]


def whole(y: Tensor) -> Iterable[tuple[tuple[slice, slice], Tensor]]:
    """Gates and ups of all rows as one chunk."""
    return [((slice(None), slice(None)), y)]


# A row's bits do not depend on how many there are; they do.
FEW_ROWS = Way(Projection.few, lambda projection, x: whole(projection.few(x)))
MANY_ROWS = Way(Projection.many, Projection.chunks)


def final_states(
    model: Model,
    tokens: Tensor,
    way: Way,
    attention: Attention,
    watch: Callable[[Tensor], None] = lambda residual: None,
    *,
    newest: Tensor | None = None,
) -> Tensor:
    """Token ids (rows,) int32 -> states after the last norm (rows, places of the head), in the model's dtype.

    watch: sees the residual behind every norm. newest: (1,) int32, a row whose state alone is given, (1, places):
    behind its attention the last layer then computes nothing of the others.
    """
    weights, epsilon = model.weights, model.epsilon
    rows, hidden = tokens.shape[0], weights.embedding.shape[1]
    residual = torch.empty(rows, hidden, dtype=torch.float32, device=tokens.device)
    first = weights.blocks[0]
    x = _buffer(model, rows, first.qkv)
    ops.embed_normed(residual, weights.embedding, tokens, first.attention_norm, epsilon, first.qkv.order, x)
    watch(residual)
    for i, block in enumerate(weights.blocks):
        last = i + 1 == len(weights.blocks)
        mixed = _buffer(model, rows, block.output)
        qkv = way.product(block.qkv, x)
        mixed = attention(qkv, model.heads[i], model.caches[i], block.output.place_of, mixed)
        if last and newest is not None:
            rows, mixed, residual = 1, mixed.index_select(0, newest), residual.index_select(0, newest)
        x = _buffer(model, rows, block.gate_up)
        added = _summed(model, way.product(block.output, mixed))
        ops.add_normed(residual, added, block.mlp_norm, epsilon, block.gate_up.order, x)
        watch(residual)
        inner = torch.empty(rows, block.gate_up.outputs // 2, dtype=model.dtype, device=tokens.device)
        for at, gate_up in way.chunks(block.gate_up, x):
            ops.gated(gate_up, block.gate_up.span, 1 / block.shrink, inner[at])
        added = _summed(model, way.product(block.down, inner))
        after = weights.head if last else weights.blocks[i + 1].qkv
        gain = weights.norm if last else weights.blocks[i + 1].attention_norm
        x = _buffer(model, rows, after)
        ops.add_normed(residual, added, gain, epsilon, after.order, x, times=block.shrink)
        watch(residual)
    return x


def _summed(model: Model, part: Tensor) -> Tensor:
    """The sum of all ranks' parts, where there are several."""
    return part if model.team is None else model.team.add_up(part)


def _buffer(model: Model, rows: int, projection: Projection) -> Tensor:
    """What a projection reads. Zeros where its order has places that nothing fills."""
    make = torch.zeros if projection.holes else torch.empty
    return make(rows, projection.places, dtype=model.dtype, device=model.weights.embedding.device)


@dataclass(frozen=True, slots=True)
class RowsAttention:
    """Every row by itself: decoding, and pieces of a few tokens."""

    rows: Rows
    scratch: Scratch
    alone: bool  # no two rows are of one sequence: keys are written on the way

    def __call__(
        self,
        qkv: Tensor,
        heads: Heads,
        cache: LayerCache,
        places_of: Tensor | None,
        out: Tensor,
        following: LayerCache | None = None,
    ) -> Tensor:
        if not self.alone:
            ops.write_cache(qkv, heads, cache, self.rows)
        ops.attend_rows(
            qkv, heads, cache, self.rows, self.scratch, places_of, out, writes=self.alone, following=following
        )
        return out


@dataclass(frozen=True, slots=True)
class PieceAttention:
    """Many rows of one sequence: prompts."""

    rows: Rows
    tiles: Tensor  # (tiles, 4) int32
    start: int  # position of the first row
    by_torch: bool  # where torch's attention can

    def __call__(
        self,
        qkv: Tensor,
        heads: Heads,
        cache: LayerCache,
        places_of: Tensor | None,
        out: Tensor,
        following: LayerCache | None = None,
    ) -> Tensor:
        count = qkv.shape[0]
        if self.by_torch and prompts.can_attend(heads, cache, count, self.start):
            mixed = prompts.attend_prompt(qkv, heads, cache, self.rows)
            if places_of is None:
                return mixed
            out[:, places_of.long()] = mixed
            return out
        ops.write_cache(qkv, heads, cache, self.rows)
        windowed = 0 < heads.window < self.start + count
        ops.attend_tiles(qkv, heads, cache, self.tiles, self.rows.pages, places_of, out, windowed=windowed)
        return out


def logits_of(model: Model, states: Tensor) -> Tensor:
    """States (rows, places) -> (rows, vocab) float32; a row's bits do not depend on the others."""
    head = model.weights.head
    if head.parts[0].packed is not None:
        return head.few(states).float()
    weight = head.parts[0].weight
    assert weight is not None
    logits = torch.empty(states.shape[0], weight.shape[0], dtype=torch.float32, device=states.device)
    ops.dense(states, weight, head.parts[0].bias, logits)
    return logits
