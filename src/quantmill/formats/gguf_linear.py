"""GGUF blocks of 32 <-> the project's packed linear, where both can hold the same values. Knows no file.

    Q4_0   d (q - 8)      4 bits, groups of 32, symmetric
    Q5_0   d (q - 16)     8-bit codes, the same levels
    Q8_0   d q            8 bits, symmetric
    Q4_1   d q + m        4 bits, asymmetric, where every m is a whole multiple of its d
    the rest              scales that float16 does not hold: dequantised instead

A linear (N out, K in) lies in GGUF as N rows of K / 32 blocks.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from quantmill.errors import UnsupportedModel
from quantmill.formats.bits import pack_words, unpack_words
from quantmill.formats.gguf import TYPES, Blocks, BlockType, Bytes, dequantize, pack, unpack
from quantmill.formats.gptq import is_sequential, unpack_zeros
from quantmill.types import CheckpointFormat, PackedLinear

GROUP = 32
BITS_OF = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 8, "Q8_0": 8}  # of the codes that a packed linear holds
LOSSLESS = {(4, True): "Q4_0", (4, False): "Q4_1", (8, True): "Q8_0"}  # (bits, symmetric) -> type


def to_packed(kind: BlockType, rows: Bytes) -> PackedLinear | None:
    """The same values as a packed linear, or None where it cannot hold them exactly.

    rows (N, K / 32 * nbytes) uint8, which may be memory-mapped.
    """
    if kind.name not in BITS_OF:
        return None
    from quantmill.formats.repack_numba import whole_zeros

    words, scales, minima = split(kind, rows)
    bits, outputs = BITS_OF[kind.name], len(rows)
    qzeros = middle_zeros(len(scales), outputs, bits) if minima is None else whole_zeros(scales, minima)
    if qzeros is None:
        return None
    columns = len(scales) * GROUP
    return PackedLinear(
        qweight=words,
        qzeros=qzeros,
        scales=scales,
        g_idx=torch.arange(columns, dtype=torch.int32) // GROUP,
        bias=None,
        bits=bits,
        group_size=GROUP,
        in_features=columns,
        out_features=outputs,
        checkpoint_format=CheckpointFormat.GPTQ_V2,
    )


def split(kind: BlockType, rows: Bytes) -> tuple[Tensor, Tensor, Tensor | None]:
    """GPTQ words (K * bits / 32, N) int32, d (K / 32, N) float16, and m alike where the type has one."""
    from quantmill.formats.repack_numba import byte_blocks, nibble_blocks

    rows = np.ascontiguousarray(rows)
    if kind.name in ("Q4_0", "Q4_1"):
        words, halves = nibble_blocks(rows, kind.nbytes, 2 if kind.has_min else 1)
        return words, halves[0], halves[1] if kind.has_min else None
    if kind.name == "Q8_0":
        return *byte_blocks(rows, kind.nbytes), None
    return split_slowly(kind, rows)


def split_slowly(kind: BlockType, rows: Bytes) -> tuple[Tensor, Tensor, Tensor | None]:
    """The slow twin of the compiled loops, and what reads Q5_0."""
    blocks = unpack(kind, rows.reshape(-1, kind.nbytes))
    codes = torch.from_numpy(blocks.codes.reshape(len(rows), -1))
    if kind.name == "Q5_0":
        codes = codes + (128 - kind.zero)

    def per_group(half: np.ndarray) -> Tensor:
        return torch.from_numpy(half.reshape(len(rows), -1).copy()).T.contiguous()

    words = pack_words(codes.T, BITS_OF[kind.name])
    return words, per_group(blocks.d), None if blocks.m is None else per_group(blocks.m)


def middle_zeros(groups: int, outputs: int, bits: int) -> Tensor:
    """Words (groups, outputs * bits / 32) int32 of zero points that are all 2^(bits - 1)."""
    row = pack_words(torch.full((outputs, 1), 2 ** (bits - 1), dtype=torch.uint8), bits)
    return row.T.repeat(groups, 1)


def whole_zeros_torch(d: Tensor, m: Tensor) -> Tensor | None:
    """The slow twin of `repack_numba.whole_zeros`."""
    wide_d, wide_m = d.double(), m.double()
    zeros = torch.where(wide_d == 0, 0.0, -wide_m / wide_d)
    whole = (zeros == zeros.round()) & (zeros >= 0) & (zeros <= 15) & ((wide_d != 0) | (wide_m == 0))
    return pack_words(zeros.to(torch.uint8).T, 4).T.contiguous() if bool(whole.all()) else None


def lossless_type(packed: PackedLinear) -> BlockType:
    """The block type that holds a packed linear. Raises UnsupportedModel with the reason where none does."""
    size = packed.in_features if packed.group_size == -1 else packed.group_size
    zeros = unpack_zeros(packed.qzeros, packed.bits, packed.out_features, packed.checkpoint_format)
    symmetric = bool((zeros == 2 ** (packed.bits - 1)).all())
    name = LOSSLESS.get((packed.bits, symmetric))
    if name is None:
        kind = "symmetric" if symmetric else "asymmetric"
        raise UnsupportedModel(f"no GGUF type holds {packed.bits}-bit {kind} codes without loss")
    if size % GROUP or packed.in_features % GROUP:
        raise UnsupportedModel(f"GGUF blocks are {GROUP} columns; groups of {size} do not fall on them")
    if not is_sequential(packed.g_idx, packed.group_size):
        raise UnsupportedModel("its groups follow an act order (g_idx), GGUF's are consecutive")
    return TYPES[name]


def from_packed(packed: PackedLinear, kind: BlockType) -> Bytes:
    """Rows (N, K / 32 * nbytes) uint8 of a packed linear; scales of wider groups are repeated.

    Exact for Q4_0 and Q8_0. Q4_1 stores the minimum -scale * zero, rounded to float16.
    """
    codes = unpack_words(packed.qweight, packed.bits, packed.in_features).T.contiguous()
    scales = packed.scales.T[:, packed.g_idx[::GROUP].long()].contiguous()
    m = None
    if kind.has_min:
        zeros = unpack_zeros(packed.qzeros, packed.bits, packed.out_features, packed.checkpoint_format)
        m = -(scales.float() * zeros[:, packed.g_idx[::GROUP].long()].float())
    blocks = Blocks(
        codes=codes.numpy().reshape(-1, GROUP),
        d=scales.numpy().reshape(-1),
        m=None if m is None else m.half().numpy().reshape(-1),
    )
    return pack(kind, blocks).reshape(packed.out_features, -1)


def dense(kind: BlockType, rows: Bytes, dtype: torch.dtype) -> Tensor:
    """The weight (N, K), each element rounded once, to `dtype`."""
    return torch.from_numpy(dequantize(kind, np.ascontiguousarray(rows))).to(dtype)
