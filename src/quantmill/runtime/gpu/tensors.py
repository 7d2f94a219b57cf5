"""Tensors that the decoder's kernels take together, and what they have to know of a model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Heads:
    """What attention has to know of a layer's heads."""

    count: int
    kv: int
    size: int
    epsilon: float
    cosines: Tensor  # (context, size / 2) float32
    sines: Tensor
    query_norm: Tensor | None  # (size,) float32
    key_norm: Tensor | None
    window: int  # positions that a row sees, its own counted; 0: all

    @property
    def group(self) -> int:
        return self.count // self.kv

    @property
    def width(self) -> int:
        """Elements of queries, keys and values of one row."""
        return (self.count + 2 * self.kv) * self.size

    @property
    def reach(self) -> int:
        return self.window or 1 << 30


@dataclass(frozen=True, slots=True)
class Gains:
    """A norm whose gains go into x before it is known: x = residual * gain * scale."""

    gain: Tensor  # (K,) float32
    epsilon: float
    scale: float  # a power of two that keeps x within fp16


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's pages. In eight bits every key and value has a scale of its own."""

    keys: Tensor  # (pages, kv, PAGE, size) as the activations, or uint8 (float8 e4m3)
    values: Tensor
    key_scales: Tensor | None  # (pages, kv, PAGE) float16
    value_scales: Tensor | None


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a pass: new tokens, wherever they belong."""

    tokens: Tensor  # (rows,) int32
    positions: Tensor  # (rows,) int32; below 0: no token, the row is filler
    sequences: Tensor  # (rows,) int32: the row's line in `pages`
    pages: Tensor  # (sequences, most pages) int32


@dataclass(frozen=True, slots=True)
class Draws:
    """How the rows of a self-feeding step draw their tokens, and what they drew. All of one width."""

    sharpness: Tensor  # (rows,) float32: 1 / temperature; 0: greedy
    top_ks: Tensor  # (rows,) int32; at least the vocabulary: off
    top_ps: Tensor  # (rows,) float32; 1: off
    uniforms: Tensor  # (RING, rows) float32: the random number of draw i is in line i % RING
    steps: Tensor  # (rows,) int32: tokens drawn so far
    drawn: Tensor  # (RING, rows) int32: token i in line i % RING


@dataclass(frozen=True, slots=True)
class Scratch:
    """Where the parts of a row's text are added up."""

    sums: Tensor  # (rows, kv, PARTS, group, size) float32; where parts are posted int64 zeros
    tops: Tensor  # (rows, kv, PARTS, group, 2), likewise
    turns: Tensor  # (rows, kv) int32 zeros: parts that have come; launches so far
