"""Streams of 2, 3, 4 or 8-bit codes <-> int32 words. Knows no model, no scale and no file.

A stream is continuous, lowest bits first: code i occupies bits [i * bits, (i + 1) * bits) of little-endian
words, so 3-bit codes 10 and 21 of every 32 straddle two words. The last word is padded with zeros.

Eight codes of b bits are b bytes for every b, so both directions hold eight one-byte codes in an int64 and
halve or double the distance between fields three times (the "compress" of Warren, Hacker's Delight,
section 7-4, with regular masks).
"""

from __future__ import annotations

import torch
from torch import Tensor

CODES_PER_BLOCK = 32  # 32 codes of b bits are b whole words


def words_for(rows: int, bits: int) -> int:
    """int32 words that `rows` codes of `bits` bits fill."""
    return -(-rows * bits // 32)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Pack along the rows: codes (rows, columns) uint8 -> (ceil(rows * bits / 32), columns) int32.

    Fastest where `codes` is the transpose of a contiguous (columns, rows) tensor, as a solver's codes are.
    """
    assert codes.dtype == torch.uint8, "codes are bytes"
    assert codes.numel() == 0 or int(codes.max()) < 2**bits, f"a code does not fit {bits} bits"
    rows, columns = codes.shape
    lines = torch.nn.functional.pad(codes.T, (0, -rows % CODES_PER_BLOCK)).reshape(-1)
    words = _compress(lines, bits).view(torch.int32).view(columns, -(-rows // CODES_PER_BLOCK) * bits)
    return words[:, : words_for(rows, bits)].T.contiguous()


def unpack_words(words: Tensor, bits: int, rows: int) -> Tensor:
    """Undo pack_words: words (ceil(rows * bits / 32), columns) int32 -> (rows, columns) uint8.

    The result is the transpose of a contiguous (columns, rows) tensor: `.T` costs nothing.
    """
    assert words.shape[0] == words_for(rows, bits), f"{words.shape[0]} words do not hold {rows} codes"
    blocks = -(-rows // CODES_PER_BLOCK)
    lines = torch.nn.functional.pad(words.T, (0, blocks * bits - words.shape[0])).reshape(-1)
    codes = _expand(lines.view(torch.uint8), bits).view(words.shape[1], blocks * CODES_PER_BLOCK)
    return codes[:, :rows].T


def _compress(codes: Tensor, bits: int) -> Tensor:
    """(8 * m,) uint8, one code a byte -> (bits * m,) uint8, the stream."""
    if bits == 8:
        return codes
    x = codes.view(torch.int64)
    x = (x | x >> 8 - bits) & _mask(2 * bits, 16)
    x = (x | x >> 16 - 2 * bits) & _mask(4 * bits, 32)
    x = (x | x >> 32 - 4 * bits) & _mask(8 * bits, 64)
    return x.view(torch.uint8).view(-1, 8)[:, :bits].reshape(-1)


def _expand(stream: Tensor, bits: int) -> Tensor:
    """(bits * m,) uint8 -> (8 * m,) uint8, one code a byte."""
    if bits == 8:
        return stream
    x = torch.nn.functional.pad(stream.view(-1, bits), (0, 8 - bits)).reshape(-1).view(torch.int64)
    x = (x | x << 32 - 4 * bits) & _mask(4 * bits, 32)
    x = (x | x << 16 - 2 * bits) & _mask(2 * bits, 16)
    x = (x | x << 8 - bits) & _mask(bits, 8)
    return x.view(torch.uint8)


def _mask(width: int, stride: int) -> int:
    """Fields of `width` low bits every `stride` bits of a 64-bit register."""
    return sum((1 << width) - 1 << at for at in range(0, 64, stride))
