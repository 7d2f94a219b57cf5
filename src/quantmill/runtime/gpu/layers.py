"""One pass through a model's layers, as a list of kernel calls. Knows no graph, no pages' owner, no sampling.

The residual is float32, so that no sum overflows; what linears read is fp16 or bf16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quantmill.runtime.gpu import ops
from quantmill.runtime.gpu.ops import Heads, LayerCache, Rows, Scratch
from quantmill.runtime.gpu.projection import Projection
from quantmill.runtime.gpu.weights import Weights

CHUNK = 512  # rows of gates and ups at a time


@dataclass(frozen=True, slots=True)
class Model:
    """Weights, cache and what attention needs, on one device."""

    weights: Weights
    heads: tuple[Heads, ...]  # of every layer
    caches: tuple[LayerCache, ...]
    epsilon: float
    dtype: torch.dtype


class Attention(Protocol):
    """Fills `out` (rows, places) from `qkv`; keys and values of the rows are in the cache afterwards."""

    def __call__(
        self, qkv: Tensor, heads: Heads, cache: LayerCache, places_of: Tensor | None, out: Tensor
    ) -> None: ...


class Product(Protocol):
    """How a projection is multiplied: `Projection.few` or `Projection.many`."""

    def __call__(self, projection: Projection, x: Tensor, /) -> Tensor: ...


def final_states(model: Model, tokens: Tensor, product: Product, attention: Attention) -> Tensor:
    """Token ids (rows,) int32 -> states after the last norm (rows, places of the head), in the model's dtype."""
    weights, epsilon = model.weights, model.epsilon
    rows, hidden = tokens.shape[0], weights.embedding.shape[1]
    residual = torch.empty(rows, hidden, dtype=torch.float32, device=tokens.device)
    first = weights.blocks[0]
    x = _buffer(model, rows, first.qkv)
    ops.embed_normed(residual, weights.embedding, tokens, first.attention_norm, epsilon, first.qkv.order, x)
    for i, block in enumerate(weights.blocks):
        mixed = _buffer(model, rows, block.output)
        attention(product(block.qkv, x), model.heads[i], model.caches[i], block.output_places, mixed)
        x = _buffer(model, rows, block.gate_up)
        added = product(block.output, mixed)
        ops.add_normed(residual, added, block.mlp_norm, epsilon, block.gate_up.order, x)
        inner = torch.empty(rows, block.gate_up.outputs // 2, dtype=model.dtype, device=tokens.device)
        ops.gated(product(block.gate_up, x), 1 / block.shrink, inner)
        added = product(block.down, inner)
        last = i + 1 == len(weights.blocks)
        after = weights.head if last else weights.blocks[i + 1].qkv
        gain = weights.norm if last else weights.blocks[i + 1].attention_norm
        x = _buffer(model, rows, after)
        ops.add_normed(residual, added, gain, epsilon, after.order, x, times=block.shrink)
    return x


def prompt_states(model: Model, tokens: Tensor, attention: Attention) -> Tensor:
    """The same for many rows, through dense copies of the weights; the bits depend on how many rows there are."""
    weights, epsilon = model.weights, model.epsilon
    rows, hidden = tokens.shape[0], weights.embedding.shape[1]
    residual = torch.empty(rows, hidden, dtype=torch.float32, device=tokens.device)
    first = weights.blocks[0]
    x = _buffer(model, rows, first.qkv)
    ops.embed_normed(residual, weights.embedding, tokens, first.attention_norm, epsilon, first.qkv.order, x)
    for i, block in enumerate(weights.blocks):
        mixed = _buffer(model, rows, block.output)
        attention(block.qkv.many(x), model.heads[i], model.caches[i], block.output_places, mixed)
        block.output.add(mixed, 1.0, residual)
        x = _buffer(model, rows, block.gate_up)
        ops.add_normed(residual, None, block.mlp_norm, epsilon, block.gate_up.order, x)
        inner = torch.empty(rows, block.gate_up.outputs // 2, dtype=model.dtype, device=tokens.device)
        for at, gate_up in block.gate_up.chunks(x, CHUNK):  # which are still in the L2 cache
            ops.gated(gate_up, 1 / block.shrink, inner[at])
        block.down.add(inner, block.shrink, residual)
        last = i + 1 == len(weights.blocks)
        after = weights.head if last else weights.blocks[i + 1].qkv
        gain = weights.norm if last else weights.blocks[i + 1].attention_norm
        x = _buffer(model, rows, after)
        ops.add_normed(residual, None, gain, epsilon, after.order, x)
    return x


def _buffer(model: Model, rows: int, projection: Projection) -> Tensor:
    """What a projection reads. Zeros where its order has places that nothing fills."""
    shape = rows, projection.places
    device = model.weights.embedding.device
    if projection.order is None:
        return torch.empty(shape, dtype=model.dtype, device=device)
    return torch.zeros(shape, dtype=model.dtype, device=device)


@dataclass(frozen=True, slots=True)
class RowsAttention:
    """Every row by itself: decoding, and pieces of a few tokens."""

    rows: Rows
    scratch: Scratch
    alone: bool  # no two rows are of one sequence: keys are written on the way

    def __call__(
        self, qkv: Tensor, heads: Heads, cache: LayerCache, places_of: Tensor | None, out: Tensor
    ) -> None:
        if not self.alone:
            ops.write_cache(qkv, heads, cache, self.rows)
        ops.attend_rows(qkv, heads, cache, self.rows, self.scratch, places_of, out, writes=self.alone)


@dataclass(frozen=True, slots=True)
class TilesAttention:
    """Many rows of few sequences: prompts."""

    rows: Rows
    tiles: Tensor  # (tiles, 4) int32
    last: int  # the highest position of the pass

    def __call__(
        self, qkv: Tensor, heads: Heads, cache: LayerCache, places_of: Tensor | None, out: Tensor
    ) -> None:
        ops.write_cache(qkv, heads, cache, self.rows)
        windowed = 0 < heads.window <= self.last
        ops.attend_tiles(qkv, heads, cache, self.tiles, self.rows.pages, places_of, out, windowed=windowed)


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
