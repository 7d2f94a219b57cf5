"""The block types of GGUF files <-> their codes and scales, bit for bit. Knows no file, no model, no solver.

A row of weights is cut into blocks of 32 or 256 columns, each with a float16 scale d. Blocks of 256
("super-blocks", the K types) hold smaller groups whose scales are integers times d, and in some types minima
that are integers times a second float16. Every type is one formula:

    w = (d * scale) * level + offset      level = code - zero, or a table's entry; offset = m or -(dmin * min)

evaluated in float32 in exactly this order, as ggml's own dequantisers do. Codes lie in *planes*: `bits` bits
of `8 / bits` runs of `span` consecutive codes share `span` bytes, the first run in the lowest bits.

Source of the layouts: ggml-common.h and ggml-quants.c of the ggml project, and the `gguf` package, against
whose dequantisers the tests hold this file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantmill.errors import UnsupportedModel

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

# The sixteen levels of IQ4_NL: ggml's kvalues_iq4nl.
IQ4_NL_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True, slots=True)
class Plane:
    """`bits` bits of every code of a block; they belong at bit `at` of the code."""

    bits: int
    span: int
    at: int = 0

    def nbytes(self, block: int) -> int:
        return block * self.bits // 8


@dataclass(frozen=True, slots=True)
class Blocks:
    """B blocks, taken apart. Integers are as the formula of the module's docstring wants them."""

    codes: Bytes  # (B, block)
    d: NDArray[np.float16]  # (B,)
    m: NDArray[np.float16] | None = None  # (B,): the minimum itself, or what multiplies `mins`
    scales: NDArray[np.int8] | None = None  # (B, block / group), K types
    mins: NDArray[np.int8] | None = None  # (B, block / group)


@dataclass(frozen=True, slots=True)
class BlockType:
    """One row of the table: how a block lies in its bytes and what its codes mean."""

    name: str
    number: int  # ggml's
    block: int  # columns
    group: int  # columns that share a scale
    bits: int  # of a code
    zero: int  # the code whose level is 0
    parts: tuple[str | Plane, ...]  # in the order of the bytes
    has_min: bool = False
    scale_range: tuple[int, int] | None = None  # of the integer scales; None: d alone
    levels: tuple[int, ...] | None = None  # where they are not code - zero

    @property
    def nbytes(self) -> int:
        return sum(_part_bytes(part, self.block) for part in self.parts)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.block

    @property
    def max_code(self) -> int:
        return int(2**self.bits - 1)

    @property
    def is_k(self) -> bool:
        """Whether it is a super-block with integer scales."""
        return self.scale_range is not None


_LOW4, _NIBBLES = Plane(4, 16), Plane(4, 32)
_SIX = (0, 63)
TYPES = {
    t.name: t
    for t in (
        BlockType("Q4_0", 2, 32, 32, 4, 8, ("d", _LOW4)),
        BlockType("Q4_1", 3, 32, 32, 4, 0, ("d", "m", _LOW4), has_min=True),
        BlockType("Q5_0", 6, 32, 32, 5, 16, ("d", Plane(1, 1, 4), _LOW4)),
        BlockType("Q5_1", 7, 32, 32, 5, 0, ("d", "m", Plane(1, 1, 4), _LOW4), has_min=True),
        BlockType("Q8_0", 8, 32, 32, 8, 128, ("d", Plane(8, 32))),
        BlockType("Q2_K", 10, 256, 16, 2, 0, ("pair4", Plane(2, 32), "d", "m"), True, (0, 15)),
        BlockType(
            "Q3_K", 11, 256, 16, 3, 4, (Plane(1, 32, 2), Plane(2, 32), "signed6", "d"), False, (-32, 31)
        ),
        BlockType("Q4_K", 12, 256, 32, 4, 0, ("d", "m", "pair6", _NIBBLES), True, _SIX),
        BlockType("Q5_K", 13, 256, 32, 5, 0, ("d", "m", "pair6", Plane(1, 32, 4), _NIBBLES), True, _SIX),
        BlockType(
            "Q6_K", 14, 256, 16, 6, 32, (Plane(4, 64), Plane(2, 32, 4), "int8", "d"), False, (-128, 127)
        ),
        BlockType("IQ4_NL", 20, 32, 32, 4, 8, ("d", _LOW4), levels=IQ4_NL_LEVELS),
    )
}
BY_NUMBER = {t.number: t for t in TYPES.values()}
FLOAT_TYPES = {"F32": 0, "F16": 1, "BF16": 30}


def block_type(name: str) -> BlockType:
    """The row called `name`. Raises UnsupportedModel, naming the rows there are."""
    if name not in TYPES:
        raise UnsupportedModel(
            f"GGUF type {name!r} is not known; quantmill knows {', '.join(TYPES)}: use one"
        )
    return TYPES[name]


def unpack(kind: BlockType, raw: Bytes) -> Blocks:
    """Take blocks apart: raw (B, nbytes) uint8 -> Blocks."""
    codes = np.zeros((len(raw), kind.block), np.uint8)
    fields: dict[str, NDArray[np.int8]] = {}
    halves: dict[str, NDArray[np.float16]] = {}
    at = 0
    for part in kind.parts:
        piece = np.ascontiguousarray(raw[:, at : at + _part_bytes(part, kind.block)])
        at += piece.shape[1]
        if isinstance(part, Plane):
            codes |= _spread(piece, part, kind.block)
        elif part in _SCALES:
            fields |= _SCALES[part].read(piece)
        else:
            halves[part] = piece.view(np.float16)[:, 0]
    if kind.name == "Q8_0":
        codes ^= np.uint8(0x80)  # stored as int8
    return Blocks(codes, halves["d"], halves.get("m"), fields.get("scales"), fields.get("mins"))


def halves(kind: BlockType, raw: Bytes) -> list[NDArray[np.float16]]:
    """The float16 fields of blocks, d and m where there is one, (B,) each: raw (B, nbytes) uint8, codes unread."""
    found, at = [], 0
    for part in kind.parts:
        nbytes = _part_bytes(part, kind.block)
        if not isinstance(part, Plane) and part not in _SCALES:
            found.append(np.ascontiguousarray(raw[:, at : at + nbytes]).view(np.float16)[:, 0])
        at += nbytes
    return found


def pack(kind: BlockType, blocks: Blocks) -> Bytes:
    """Undo `unpack`: raw (B, nbytes) uint8. Nothing is rounded."""
    codes = blocks.codes ^ np.uint8(0x80) if kind.name == "Q8_0" else blocks.codes
    pieces = []
    for part in kind.parts:
        if isinstance(part, Plane):
            pieces.append(_gather(codes, part))
        elif part in _SCALES:
            pieces.append(_SCALES[part].write(blocks))
        else:
            half = np.ascontiguousarray(getattr(blocks, part), np.float16)
            pieces.append(half.view(np.uint8).reshape(-1, 2))
    return np.concatenate(pieces, axis=1)


def steps(kind: BlockType, blocks: Blocks) -> tuple[Floats, Floats | None]:
    """What every group multiplies its levels with and adds to them: two (B, groups) float32, None for 0."""
    d = blocks.d.astype(np.float32)[:, None]
    scale = d if blocks.scales is None else d * blocks.scales.astype(np.float32)
    if blocks.m is None:
        return scale, None
    m = blocks.m.astype(np.float32)[:, None]
    return scale, m if blocks.mins is None else -(m * blocks.mins.astype(np.float32))


def values(kind: BlockType, blocks: Blocks) -> Floats:
    """The weights (B, block) float32 that ggml makes of the blocks, bit for bit."""
    scale, offset = steps(kind, blocks)
    grouped = levels(kind, blocks.codes).reshape(len(blocks.codes), -1, kind.group)
    grouped *= scale[:, :, None]
    if offset is not None:
        grouped += offset[:, :, None]
    return grouped.reshape(blocks.codes.shape)


def levels(kind: BlockType, codes: Bytes) -> Floats:
    """What codes of any shape stand for before scale and offset, float32."""
    if kind.levels is not None:
        return np.array(kind.levels, np.float32)[codes]
    return codes.astype(np.float32) - np.float32(kind.zero)


def row_bytes(kind: BlockType, columns: int) -> int:
    """Bytes of a row of weights. Raises UnsupportedModel where blocks do not divide it."""
    if columns % kind.block:
        raise UnsupportedModel(f"{kind.name} needs rows of a multiple of {kind.block} columns, not {columns}")
    return columns // kind.block * kind.nbytes


def dequantize(kind: BlockType, raw: Bytes) -> Floats:
    """Rows of weights: raw (N, row bytes) uint8 -> (N, K) float32."""
    blocks = raw.reshape(-1, kind.nbytes)
    return values(kind, unpack(kind, blocks)).reshape(len(raw), -1)


def _part_bytes(part: str | Plane, block: int) -> int:
    if isinstance(part, Plane):
        return part.nbytes(block)
    return _SCALES[part].nbytes if part in _SCALES else 2


def _spread(piece: Bytes, plane: Plane, block: int) -> Bytes:
    """A plane's bytes (B, n) -> its bits of every code (B, block), where they belong in the code."""
    if plane.bits == 8:
        return piece
    shifts = np.arange(0, 8, plane.bits, dtype=np.uint8)[:, None]
    runs = piece.reshape(len(piece), -1, 1, plane.span) >> shifts
    runs &= np.uint8(2**plane.bits - 1)
    runs <<= np.uint8(plane.at)
    return runs.reshape(len(piece), block)


def _gather(codes: Bytes, plane: Plane) -> Bytes:
    """Undo `_spread`."""
    if plane.bits == 8:
        return codes
    mask = np.uint8(2**plane.bits - 1)
    runs = (codes >> np.uint8(plane.at) & mask).reshape(len(codes), -1, 8 // plane.bits, plane.span)
    shifts = np.arange(0, 8, plane.bits, dtype=np.uint8)[:, None]
    packed: Bytes = np.bitwise_or.reduce(runs << shifts, axis=2)
    return packed.reshape(len(codes), -1)


@dataclass(frozen=True, slots=True)
class _ScaleField:
    """How the integer scales (and minima) of a super-block lie."""

    nbytes: int
    read: Callable[[Bytes], dict[str, NDArray[np.int8]]]
    write: Callable[[Blocks], Bytes]


def _read_pair4(raw: Bytes) -> dict[str, NDArray[np.int8]]:
    return {"scales": (raw & 15).view(np.int8), "mins": (raw >> 4).view(np.int8)}


def _write_pair4(blocks: Blocks) -> Bytes:
    scales, mins = _both(blocks)
    return scales | mins << np.uint8(4)


def _read_pair6(raw: Bytes) -> dict[str, NDArray[np.int8]]:
    """Eight scales and eight minima of six bits in twelve bytes; the last four keep their top bits apart."""
    first, second, third = raw[:, :4], raw[:, 4:8], raw[:, 8:]
    scales = np.concatenate([first & 63, third & 15 | first >> 2 & 48], axis=1)
    mins = np.concatenate([second & 63, third >> 4 | second >> 2 & 48], axis=1)
    return {"scales": scales.view(np.int8), "mins": mins.view(np.int8)}


def _write_pair6(blocks: Blocks) -> Bytes:
    scales, mins = _both(blocks)
    low_s, high_s, low_m, high_m = scales[:, :4], scales[:, 4:], mins[:, :4], mins[:, 4:]
    first, second = low_s | (high_s & 48) << 2, low_m | (high_m & 48) << 2
    return np.concatenate([first, second, high_s & 15 | high_m << 4], axis=1)


def _read_signed6(raw: Bytes) -> dict[str, NDArray[np.int8]]:
    """Sixteen scales of six bits, 32 added: four low bits in eight bytes, two high bits in four."""
    low, high = _spread(raw[:, :8], Plane(4, 8), 16), _spread(raw[:, 8:], Plane(2, 4, 4), 16)
    return {"scales": (low | high).view(np.int8) - np.int8(32)}


def _write_signed6(blocks: Blocks) -> Bytes:
    assert blocks.scales is not None
    stored = (blocks.scales + np.int8(32)).view(np.uint8)
    return np.concatenate([_gather(stored, Plane(4, 8)), _gather(stored, Plane(2, 4, 4))], axis=1)


def _read_int8(raw: Bytes) -> dict[str, NDArray[np.int8]]:
    return {"scales": raw.view(np.int8)}


def _write_int8(blocks: Blocks) -> Bytes:
    assert blocks.scales is not None
    return np.ascontiguousarray(blocks.scales).view(np.uint8)


def _both(blocks: Blocks) -> tuple[Bytes, Bytes]:
    assert blocks.scales is not None
    assert blocks.mins is not None
    return np.ascontiguousarray(blocks.scales).view(np.uint8), np.ascontiguousarray(blocks.mins).view(
        np.uint8
    )


_SCALES = {
    "pair4": _ScaleField(16, _read_pair4, _write_pair4),
    "pair6": _ScaleField(12, _read_pair6, _write_pair6),
    "signed6": _ScaleField(12, _read_signed6, _write_signed6),
    "int8": _ScaleField(16, _read_int8, _write_int8),
}
