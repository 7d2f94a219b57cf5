"""A linear as it lies in a file -> tiles for the GPU's kernels, on the device, in one pass over the codes.

A *tile* is 16 rows (outputs); it is cut into *units*, what the 32 threads of a warp take with one load of 16 bytes
each (3 bits: three loads). A unit holds so many *planes*; a plane is 16 rows times 16 columns, the left operand of
the tensor cores' `mma.m16n8k16`, and each thread holds exactly the codes that it puts into that instruction: word r
of a thread holds, for every plane, the two codes of register r. So nothing is moved between threads, and every load
is contiguous.

Which columns make a plane is free, as long as x is read in the same order. Thread t of a quad takes 8 neighbours
of 32 columns, 16 bytes of x, for two planes (`narrow`, for groups of 16: 4 neighbours of 16 columns, for one).

Columns are in the file's order where its groups are consecutive and of a size that planes can honour. Elsewhere
(true act order, groups of 24) they are sorted by group, every group filled up with places that take no input, and
`order` names the input of each place: who makes x puts it into this order, or the kernel reads x through it.
Knows no kernel's tuning.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantmill.formats.gptq import is_sequential, pack_words, unpack_zeros
from quantmill.types import CheckpointFormat, PackedLinear

TILE = 16  # rows of a tile
ROWS = 128  # rows are filled up to a multiple: the largest block of rows that one program takes
PLANE = 16  # columns of a plane
WIDE = 32  # columns that two planes share, unless narrow


@dataclass(frozen=True, slots=True)
class TileShape:
    """How columns fall into units: numbers that kernels are compiled for."""

    bits: int
    group: int  # columns that share a scale: a power of two from 16 up, or all columns of the tiles
    narrow: bool

    @property
    def planes(self) -> int:
        return 16 if self.bits == 3 else 16 // self.bits

    @property
    def words(self) -> int:
        return 3 if self.bits == 3 else 1

    @property
    def columns(self) -> int:
        """Columns of a unit."""
        return self.planes * PLANE

    @property
    def group_planes(self) -> int:
        """Planes that share a scale."""
        return self.group // PLANE


@dataclass(frozen=True, slots=True)
class TiledLinear:
    """A linear in tiles, all tensors on one device. Inputs K, outputs N, `rows` >= N of them stored."""

    words: Tensor  # (tiles, units, words, 32 threads, 4) int32
    scales: Tensor  # (tiles, groups, 8) int32: two float16, of rows g and g + 8; 0 where there is no output
    zeros: Tensor | None  # the same of 2**(bits - 1) less the zero point; None: 0 everywhere
    order: Tensor | None  # (units * columns,) int32: the input of each place, -1: none; None: 0, 1, 2 ...
    bias: Tensor | None  # (N,) float16
    shape: TileShape
    in_features: int
    out_features: int

    @property
    def units(self) -> int:
        return self.words.shape[1]

    @property
    def columns(self) -> int:
        """Places, filled ones and empty ones."""
        return self.units * self.shape.columns

    @property
    def rows(self) -> int:
        return self.words.shape[0] * TILE

    @property
    def groups(self) -> int:
        return self.scales.shape[1]

    @property
    def nbytes(self) -> int:
        """What one product reads of it, less the bias."""
        held = (self.words, self.scales, self.zeros, self.order)
        return sum(t.numel() * t.element_size() for t in held if t is not None)


def tile_shape(bits: int, group_size: int, in_features: int) -> TileShape:
    """The units for a linear with K inputs."""
    planes = 16 if bits == 3 else 16 // bits
    if group_size == -1 or group_size >= in_features:
        columns = planes * PLANE
        return TileShape(bits, -(-in_features // columns) * columns, narrow=False)
    power = max(group_size & -group_size, PLANE)
    return TileShape(bits, power, narrow=power < WIDE)


def column_order(g_idx: Tensor, group: int) -> Tensor:
    """The input of each place, -1 where none: sorted by group, every group a multiple of `group` long. int32."""
    by_group = torch.argsort(g_idx, stable=True)
    counts = torch.bincount(g_idx.long())
    filled = (counts + group - 1) // group * group
    lengths = filled.cumsum(0) - counts.cumsum(0)  # places filled up until the end of each group
    shift = torch.cat([lengths.new_zeros(1), lengths[:-1]]).index_select(0, g_idx.long()[by_group])
    order = torch.full((int(filled.sum()),), -1, dtype=torch.int32, device=g_idx.device)
    order[torch.arange(len(by_group), device=g_idx.device) + shift] = by_group.to(torch.int32)
    return order


def tile(packed: PackedLinear) -> TiledLinear:
    """Lay a linear out in tiles on the device where it lies. Scales are copied, never rounded."""
    from quantmill.kernels.triton.repack import repack_kernel

    k, n, device = packed.in_features, packed.out_features, packed.qweight.device
    shape = tile_shape(packed.bits, packed.group_size, k)
    ordered = not (is_sequential(packed.g_idx, packed.group_size) and _honours(shape, packed.group_size, k))
    if ordered:
        order = column_order(packed.g_idx, shape.group)
    else:
        order = torch.arange(k, dtype=torch.int32, device=device)
    units = -(-len(order) // shape.columns)
    order = torch.nn.functional.pad(order, (0, units * shape.columns - len(order)), value=-1)
    tiles = -(-n // ROWS) * (ROWS // TILE)
    words = torch.empty(tiles, units, shape.words, 32, 4, dtype=torch.int32, device=device)
    at_once = ROWS // TILE
    repack_kernel[(tiles // at_once, units)](
        packed.qweight.contiguous(), order, words, n, units, packed.bits, shape.narrow, at_once
    )
    scales, zeros = _group_tensors(packed, order, shape.group, tiles)
    bias = None if packed.bias is None else packed.bias.contiguous()
    return TiledLinear(words, scales, zeros, order if ordered else None, bias, shape, k, n)


def _honours(shape: TileShape, group_size: int, in_features: int) -> bool:
    """Whether consecutive groups of `group_size` begin where the tiles' groups begin."""
    return group_size == -1 or group_size >= in_features or group_size % shape.group == 0


def _group_tensors(
    packed: PackedLinear, order: Tensor, group: int, tiles: int
) -> tuple[Tensor, Tensor | None]:
    """Scales and the middle less zero points as pairs (tiles, groups, 8); zeros None if all are the middle."""
    firsts = order[::group].long()  # a group's first place always takes an input, or the group takes none
    source = packed.g_idx.long().index_select(0, firsts.clamp(min=0))
    scales = packed.scales.index_select(0, source)
    scales = torch.where((firsts >= 0)[:, None], scales, torch.zeros_like(scales))
    if _all_middle(packed):
        return _pairs(scales, tiles), None
    true = unpack_zeros(packed.qzeros, packed.bits, packed.out_features, packed.checkpoint_format)
    zeros = (2 ** (packed.bits - 1) - true.T.index_select(0, source).to(torch.int16)).to(torch.float16)
    return _pairs(scales, tiles), _pairs(zeros, tiles)


def _all_middle(packed: PackedLinear) -> bool:
    """Whether every zero point is the middle of the codes' range, as in symmetric grids; unpacks none of them."""
    if packed.out_features % 32:
        return False
    stored = 2 ** (packed.bits - 1) - (packed.checkpoint_format is CheckpointFormat.GPTQ)
    equal = torch.full((32, 1), stored, dtype=torch.uint8)
    pattern = pack_words(equal, packed.bits).flatten().to(packed.qzeros.device)
    return bool((packed.qzeros.view(-1, packed.bits) == pattern).all())


def _pairs(values: Tensor, tiles: int) -> Tensor:
    """(groups, N) float16 -> (tiles, groups, 8) int32: rows g and g + 8 of every tile side by side."""
    filled = torch.nn.functional.pad(values, (0, tiles * TILE - values.shape[1]))
    halves = filled.view(-1, tiles, 2, 8).permute(1, 0, 3, 2).contiguous()
    return halves.view(torch.int32).squeeze(-1)
