"""A linear as it lies in a file -> tiles for the GPU's kernels, on the device, in one pass over the codes.

A *tile* is all rows (outputs) by so many columns (inputs) as its 16-bit words hold. A row of a tile has
`places` words side by side; word i holds code i of every *plane*, so masking a register with two words gives two
neighbouring columns of one plane, which is what a tensor core takes. Plane p, place i of tile t is column
(t * planes + p) * places + i. Three bits take three words a place: five codes in each, and the sixteenth in their
top bits.

Columns are in the file's order where its groups are consecutive and of a size that planes can honour. Elsewhere
(true act order, groups of 24) they are sorted by group, every group filled up with places that take no input, and
`order` names the input of each place; the kernel reads x through it. Knows no kernel's tuning.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantmill.formats.gptq import is_sequential, unpack_zeros
from quantmill.types import PackedLinear

ROWS = 128  # rows are filled up to a multiple: the largest block of rows that one program takes
MOST_COLUMNS = 256  # of a tile that need not be wider
_REPACK_ROWS = 64


@dataclass(frozen=True, slots=True)
class TileShape:
    """How columns fall into tiles: numbers that kernels are compiled for."""

    bits: int
    places: int  # 16, 32 or 64
    group: int  # columns that share a scale: a multiple of `columns`, or a power of two from `places` up

    @property
    def planes(self) -> int:
        return 16 if self.bits == 3 else 16 // self.bits

    @property
    def words(self) -> int:
        return 3 if self.bits == 3 else 1

    @property
    def columns(self) -> int:
        return self.planes * self.places

    @property
    def group_planes(self) -> int:
        """Planes of one tile that share a scale."""
        return min(self.planes, self.group // self.places)

    @property
    def tiles_per_group(self) -> int:
        return max(1, self.group // self.columns)


@dataclass(frozen=True, slots=True)
class TiledLinear:
    """A linear in tiles, all tensors on one device. Inputs K, outputs N, `rows` >= N of them stored."""

    words: Tensor  # (tiles, words, rows, places) int16
    scales: Tensor  # (groups, rows) float16, 0 where there is no output
    zeros: Tensor | None  # (groups, rows) int8: zero point less 2**(bits - 1); None: 0 everywhere
    order: Tensor | None  # (tiles * columns,) int32: the input of each place, -1: none; None: 0, 1, 2 ...
    bias: Tensor | None  # (N,) float16
    shape: TileShape
    in_features: int
    out_features: int

    @property
    def tiles(self) -> int:
        return self.words.shape[0]

    @property
    def rows(self) -> int:
        return self.words.shape[2]

    @property
    def nbytes(self) -> int:
        """What one product reads of it, less the bias."""
        held = (self.words, self.scales, self.zeros, self.order)
        return sum(t.numel() * t.element_size() for t in held if t is not None)


def tile_shape(bits: int, group_size: int, in_features: int) -> TileShape:
    """The tiles for a linear with K inputs; as few columns are filled up as two sizes of tile allow."""
    whole = group_size == -1 or group_size >= in_features
    power = 1 << 30 if whole else group_size & -group_size
    planes = 16 if bits == 3 else 16 // bits
    fits = [
        p for p in (64, 32) if power >= p and in_features % (planes * p) == 0 and planes * p <= MOST_COLUMNS
    ]
    places = 16 if bits == 3 or not fits else fits[0]
    columns = planes * places
    if whole:
        return TileShape(bits, places, -(-in_features // columns) * columns)
    return TileShape(bits, places, group_size if group_size % columns == 0 else max(power, places))


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
    tiles = -(-len(order) // shape.columns)
    order = torch.nn.functional.pad(order, (0, tiles * shape.columns - len(order)), value=-1)
    rows = -(-n // ROWS) * ROWS
    words = torch.empty(tiles, shape.words, rows, shape.places, dtype=torch.int16, device=device)
    repack_kernel[(tiles, rows // _REPACK_ROWS)](
        packed.qweight.contiguous(), order, words, n, rows, packed.bits, shape.places, _REPACK_ROWS
    )
    scales, zeros = _group_tensors(packed, order, shape.group, rows)
    bias = None if packed.bias is None else packed.bias.contiguous()
    return TiledLinear(words, scales, zeros, order if ordered else None, bias, shape, k, n)


def _honours(shape: TileShape, group_size: int, in_features: int) -> bool:
    """Whether consecutive groups of `group_size` begin where the tiles' groups begin."""
    return group_size == -1 or group_size >= in_features or group_size % shape.group == 0


def _group_tensors(
    packed: PackedLinear, order: Tensor, group: int, rows: int
) -> tuple[Tensor, Tensor | None]:
    """Scales (groups, rows) float16 and zero points less the middle (groups, rows) int8, None if all are 0."""
    firsts = order[::group].long()  # a group's first place always takes an input, or the group takes none
    source = packed.g_idx.long().index_select(0, firsts.clamp(min=0))
    scales = packed.scales.index_select(0, source)
    scales = torch.where((firsts >= 0)[:, None], scales, torch.zeros_like(scales))
    fill = (0, rows - packed.out_features)
    true = unpack_zeros(packed.qzeros, packed.bits, packed.out_features, packed.checkpoint_format)
    zeros = (true.T.index_select(0, source).to(torch.int16) - 2 ** (packed.bits - 1)).to(torch.int8)
    pad = torch.nn.functional.pad
    return pad(scales, fill).contiguous(), pad(zeros, fill).contiguous() if bool(zeros.any()) else None
