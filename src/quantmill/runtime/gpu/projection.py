"""Linears that share an input, stacked side by side, as the decoder runs them. Knows no model.

Few rows go straight from the codes, and a row's bits do not depend on how many come with it. Very many rows of one
piece go through dense copies and the vendor's product.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantmill.formats.bits import pack_words
from quantmill.formats.gptq import unpack_zeros
from quantmill.kernels.triton.linear import (
    RunnableLinear,
    dense_weight,
    goes_wide,
    has_wide,
    many_product,
    matmul,
)
from quantmill.kernels.triton.packing import TILE, tile
from quantmill.runtime.gpu import ops
from quantmill.types import CheckpointFormat, PackedLinear

SPAN = 8  # gates, then as many ups: half a tile of the kernel for few rows
FEW = 128  # rows that go straight from the codes at once
DENSE_ROWS = 1024  # more rows than these go through dense copies
WIDE_ROWS = 1024  # rows of gates and ups at once where there are no copies
DENSE_OUTPUTS = 4096  # of gates and ups that a dense copy holds at once


@dataclass(frozen=True, slots=True)
class Part:
    """One linear: quantised, or a dense weight."""

    packed: RunnableLinear | None
    weight: Tensor | None  # (N, K)
    bias: Tensor | None  # (N,) float32, of a dense one

    @property
    def nbytes(self) -> int:
        """What one step reads of it."""
        if self.packed is not None:
            return self.packed.tiled.nbytes
        assert self.weight is not None
        return self.weight.numel() * self.weight.element_size()

    @property
    def inputs(self) -> int:
        if self.packed is not None:
            return self.packed.tiled.in_features
        assert self.weight is not None
        return self.weight.shape[1]

    @property
    def order(self) -> Tensor | None:
        """The order through which the kernel itself reads x."""
        return None if self.packed is None else self.packed.tiled.order

    @property
    def outputs(self) -> int:
        if self.packed is not None:
            return self.packed.tiled.out_features
        assert self.weight is not None
        return self.weight.shape[0]

    def few(self, x: Tensor) -> Tensor:
        """x (M, places), any M -> (M, N); where there is no kernel for many rows FEW rows at a time."""
        if self.packed is not None and has_wide(x.device):
            return matmul(x, self.packed)
        if self.packed is not None:
            blocks = [matmul(block, self.packed) for block in torch.split(x, FEW)]
            return blocks[0] if len(blocks) == 1 else torch.cat(blocks)
        assert self.weight is not None
        y = x.new_empty(x.shape[0], self.weight.shape[0])
        ops.dense(x, self.weight, self.bias, y)
        return y

    def many(self, x: Tensor) -> Tensor:
        """The same for rows that come together: the bits may depend on M."""
        if self.packed is None:
            return self.through_copy(x)
        return self.few(x) if x.shape[0] <= FEW else many_product(x, self.packed)

    def goes_wide(self, x: Tensor) -> bool:
        """Whether so many rows go straight from the codes, too."""
        return self.packed is not None and goes_wide(x[:WIDE_ROWS], self.packed)

    def through_copy(self, x: Tensor) -> Tensor:
        """The same through a dense copy and the vendor's product."""
        return self.product(x, self.dense(x.dtype))

    def some(self, begin: int, end: int) -> Part:
        """Outputs `begin` to `end` by themselves, without a copy. `begin` is a multiple of 128."""
        assert self.packed is not None, "only tiles can be cut"
        t = self.packed.tiled
        tiles = slice(begin // TILE, -(-end // TILE))
        cut = dataclasses.replace(
            t,
            words=t.words[tiles],
            scales=t.scales[tiles],
            zeros=None if t.zeros is None else t.zeros[tiles],
            bias=None if t.bias is None else t.bias[begin:end],
            out_features=end - begin,
        )
        return Part(RunnableLinear(cut, self.packed.arrived), None, None)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """x (M, K) times what `dense` gave, bias added."""
        bias = self._bias
        return torch.nn.functional.linear(self._read(x), weight, None if bias is None else bias.to(x.dtype))

    @property
    def _bias(self) -> Tensor | None:
        return self.bias if self.packed is None else self.packed.tiled.bias

    def _read(self, x: Tensor) -> Tensor:
        """x as the columns of the dense weight lie."""
        return x if self.order is None else x.index_select(1, self.order.clamp(min=0).long())

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight (N, places) in `dtype`."""
        if self.packed is not None:
            return dense_weight(self.packed.tiled, dtype)
        assert self.weight is not None
        return self.weight.to(dtype)


@dataclass(frozen=True, slots=True)
class Projection:
    """One or several parts with one input. `order`: the input of each place of x, below 0: 0; None: as it is."""

    parts: tuple[Part, ...]
    order: Tensor | None  # (places,) int32
    places: int  # columns of x
    outputs: int
    span: int  # of gate_up: so many gates, their ups, the next gates ...
    holes: bool = False  # some places take no input: they must be 0
    place_of: Tensor | None = None  # (inputs,) int32: where each input goes, the inverse of `order`

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def few(self, x: Tensor) -> Tensor:
        """x (M, places) -> (M, outputs) in x's dtype; up to `same_bits_up_to()` a row's bits do not depend on M."""
        results = [part.few(x) for part in self.parts]
        return results[0] if len(results) == 1 else torch.cat(results, 1)

    def many(self, x: Tensor) -> Tensor:
        """The same for rows that come together; the bits may depend on M."""
        results = [part.many(x) for part in self.parts]
        return results[0] if len(results) == 1 else torch.cat(results, 1)

    def through_copy(self, x: Tensor) -> Tensor:
        """The same through a dense copy."""
        results = [part.through_copy(x) for part in self.parts]
        return results[0] if len(results) == 1 else torch.cat(results, 1)

    def chunks(self, x: Tensor) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
        """Of gates and ups: the product of some rows and outputs at a time, and which (rows, gates) these are."""
        (part, *others), every = self.parts, slice(None)
        if x.shape[0] <= DENSE_ROWS or self.span != SPAN or others:
            yield (every, every), self.many(x)
            return
        if part.goes_wide(x):
            for first in range(0, x.shape[0], WIDE_ROWS):
                rows = slice(first, first + WIDE_ROWS)
                yield (rows, every), part.many(x[rows])
            return
        for begin in range(0, self.outputs, DENSE_OUTPUTS):
            end = min(self.outputs, begin + DENSE_OUTPUTS)
            some = part.some(begin, end)
            yield (every, slice(begin // 2, end // 2)), some.product(x, some.dense(x.dtype))


def quantised(linears: Sequence[PackedLinear], span: int = 0) -> Projection:
    """Stack linears (on one device) that share an input; apart where they cannot be one.

    span: weave the outputs of two linears, so many of the first, of the second, of the first ...
    """
    stacked = stack(linears)
    if stacked is None:
        return apart([part_of(p) for p in linears], linears[0].in_features)
    if span:
        stacked = reordered(stacked, woven(stacked.out_features // 2, span, stacked.qweight.device))
    tiled = tile(stacked)
    order, places = tiled.order, tiled.in_features
    if order is not None:  # whoever makes x puts it into this order
        places = order.shape[0]
        tiled = dataclasses.replace(tiled, order=None, in_features=places)
    part = Part(RunnableLinear.of(tiled), None, None)
    span = span or part.outputs // 2
    if order is None:
        return Projection((part,), None, places, part.outputs, span)
    return Projection((part,), order, places, part.outputs, span, bool((order < 0).any()), inverse_of(order))


def part_of(linear: PackedLinear) -> Part:
    """One linear by itself, whose kernel reads x through its order if it has one."""
    return Part(RunnableLinear.of(tile(linear)), None, None)


def apart(parts: Sequence[Part], inputs: int) -> Projection:
    """Linears that stay as they are, each reading x as it comes."""
    outputs = sum(p.outputs for p in parts)
    return Projection(tuple(parts), None, inputs, outputs, outputs // 2)


def unquantised(weight: Tensor, bias: Tensor | None) -> Part:
    """A dense linear; `bias` float32."""
    return Part(None, weight.contiguous(), bias)


def inverse_of(order: Tensor) -> Tensor:
    """(inputs,) int32: the place of every input. `order`: the input of every place, below 0: none."""
    taken = order >= 0
    places = torch.arange(len(order), dtype=torch.int32, device=order.device)[taken]
    inverse = torch.empty_like(places)
    inverse[order[taken].long()] = places
    return inverse


def woven(columns: int, span: int, device: torch.device) -> Tensor:
    """(2 * columns,) int64: the outputs of two linears of `columns` each, `span` of each by turns."""
    return torch.arange(2 * columns, device=device).view(2, -1, span).transpose(0, 1).reshape(-1)


def stack(linears: Sequence[PackedLinear]) -> PackedLinear | None:
    """One linear with the outputs of all, or None where bits, groups or their order differ."""
    first = linears[0]
    if len(linears) == 1:
        return first
    same = all(
        (p.bits, p.group_size, p.in_features) == (first.bits, first.group_size, first.in_features)
        and torch.equal(p.g_idx, first.g_idx)
        for p in linears
    )
    if not same:
        return None
    zeros = torch.cat([unpack_zeros(p.qzeros, p.bits, p.out_features, p.checkpoint_format) for p in linears])
    bias = None
    if any(p.bias is not None for p in linears):
        bias = torch.cat([p.scales.new_zeros(p.out_features) if p.bias is None else p.bias for p in linears])
    return dataclasses.replace(
        first,
        qweight=torch.cat([p.qweight for p in linears], 1),
        qzeros=pack_words(zeros, first.bits).T.contiguous(),
        scales=torch.cat([p.scales for p in linears], 1),
        bias=bias,
        out_features=sum(p.out_features for p in linears),
        checkpoint_format=CheckpointFormat.GPTQ_V2,
    )


def reordered(linear: PackedLinear, order: Tensor | None) -> PackedLinear:
    """Outputs in another order: output i of the result is output order[i]."""
    if order is None:
        return linear
    at = order.long()
    zeros = unpack_zeros(linear.qzeros, linear.bits, linear.out_features, linear.checkpoint_format)
    return dataclasses.replace(
        linear,
        qweight=linear.qweight.index_select(1, at),
        qzeros=pack_words(zeros.index_select(0, at), linear.bits).T.contiguous(),
        scales=linear.scales.index_select(1, at),
        bias=None if linear.bias is None else linear.bias.index_select(0, at),
        out_features=len(at),
        checkpoint_format=CheckpointFormat.GPTQ_V2,
    )
