"""Foreign 4- and 8-bit layouts -> GPTQ's words on a CPU, at the speed of memory. Twins: awq.py, gguf_linear.py.

Each loop reads its input once in order and writes whole cache lines: a tile of 64 outputs at a time where the
input runs along K, so that four lines of every row of words are on their way together.
"""

# mypy: disable-error-code="no-untyped-def, no-any-unimported"
from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from quantmill.formats.gguf import Bytes

TILE = 64  # outputs: sixteen words are a cache line

_NIBBLES = np.uint64(0x0F0F0F0F0F0F0F0F)
_BYTES = np.uint64(0x00FF00FF00FF00FF)
_WORDS = np.uint64(0x0000FFFF0000FFFF)
_LOW = np.uint64(0xFFFFFFFF)


@njit(cache=True, inline="always")
def _swap(a, b, shift, mask):
    """Exchange the bits of `a` above `shift` with those of `b` below it, where `mask` says."""
    t = ((a >> shift) ^ b) & mask
    return a ^ (t << shift), b ^ t


@njit(cache=True, parallel=True)
def _awq_to_gptq(words, out):
    rows, columns = words.shape
    s4, s8, s16 = np.uint32(4), np.uint32(8), np.uint32(16)
    m4, m8, m16 = np.uint32(0x0F0F0F0F), np.uint32(0x00FF00FF), np.uint32(0x0000FFFF)
    for r in prange(rows // 8):
        k = 8 * r
        for c in range(columns):
            w0, w1, w2, w3 = words[k, c], words[k + 1, c], words[k + 2, c], words[k + 3, c]
            w4, w5, w6, w7 = words[k + 4, c], words[k + 5, c], words[k + 6, c], words[k + 7, c]
            # An 8 x 8 transpose of nibbles: halves, quarters, single ones.
            w0, w4 = _swap(w0, w4, s16, m16)
            w1, w5 = _swap(w1, w5, s16, m16)
            w2, w6 = _swap(w2, w6, s16, m16)
            w3, w7 = _swap(w3, w7, s16, m16)
            w0, w2 = _swap(w0, w2, s8, m8)
            w1, w3 = _swap(w1, w3, s8, m8)
            w4, w6 = _swap(w4, w6, s8, m8)
            w5, w7 = _swap(w5, w7, s8, m8)
            w0, w1 = _swap(w0, w1, s4, m4)
            w2, w3 = _swap(w2, w3, s4, m4)
            w4, w5 = _swap(w4, w5, s4, m4)
            w6, w7 = _swap(w6, w7, s4, m4)
            n = 8 * c  # nibble i belongs to column (0, 2, 4, 6, 1, 3, 5, 7)[i]
            out[r, n], out[r, n + 2], out[r, n + 4], out[r, n + 6] = w0, w1, w2, w3
            out[r, n + 1], out[r, n + 3], out[r, n + 5], out[r, n + 7] = w4, w5, w6, w7


def awq_to_gptq(qweight: Tensor) -> Tensor:
    """AWQ words (K, N / 8) int32, K % 8 == 0 -> GPTQ words (K / 8, N) int32."""
    rows, columns = qweight.shape
    out = torch.empty(rows // 8, 8 * columns, dtype=torch.int32)
    _awq_to_gptq(qweight.contiguous().numpy().view(np.uint32), out.numpy().view(np.uint32))
    return out


@njit(cache=True, inline="always")
def _squeeze(x):
    """Eight nibbles, each alone in its byte -> one word."""
    x = (x | x >> np.uint64(4)) & _BYTES
    x = (x | x >> np.uint64(8)) & _WORDS
    return np.uint32((x | x >> np.uint64(16)) & _LOW)


@njit(cache=True, inline="always")
def _eight(row, at):
    """Four 16-bit units from `at` on as one word of 64 bits."""
    low = np.uint64(row[at]) | np.uint64(row[at + 1]) << np.uint64(16)
    return low | np.uint64(row[at + 2]) << np.uint64(32) | np.uint64(row[at + 3]) << np.uint64(48)


@njit(cache=True, parallel=True)
def _nibble_blocks(rows, units, words, halves):
    """rows (N, blocks * units) uint16: the halves, then 16 bytes of nibbles -> words (4 blocks, N)."""
    outputs, blocks, skip = rows.shape[0], rows.shape[1] // units, halves.shape[0]
    for tile in prange(-(-outputs // TILE)):
        first, last = tile * TILE, min((tile + 1) * TILE, outputs)
        for b in range(blocks):
            at = b * units
            for n in range(first, last):
                row = rows[n]
                for h in range(skip):
                    halves[h, b, n] = row[at + h]
                x, y = _eight(row, at + skip), _eight(row, at + skip + 4)
                words[4 * b, n] = _squeeze(x & _NIBBLES)
                words[4 * b + 1, n] = _squeeze(y & _NIBBLES)
                words[4 * b + 2, n] = _squeeze(x >> np.uint64(4) & _NIBBLES)
                words[4 * b + 3, n] = _squeeze(y >> np.uint64(4) & _NIBBLES)


def nibble_blocks(rows: Bytes, nbytes: int, halves: int) -> tuple[Tensor, Tensor]:
    """Q4_0 (halves 1) or Q4_1 (2) rows (N, K / 32 * nbytes) -> words (K / 8, N) int32, (halves, K / 32, N) f16."""
    blocks = rows.shape[1] // nbytes
    words = torch.empty(4 * blocks, rows.shape[0], dtype=torch.int32)
    stored = torch.empty(halves, blocks, rows.shape[0], dtype=torch.float16)
    into = words.numpy().view(np.uint32), stored.numpy().view(np.uint16)
    _nibble_blocks(rows.view(np.uint16), nbytes // 2, *into)
    return words, stored


@njit(cache=True, parallel=True)
def _byte_blocks(rows, units, words, halves):
    """Q8_0 rows (N, blocks * units) uint16 -> words (8 blocks, N) of codes with 128 added."""
    outputs, blocks = rows.shape[0], rows.shape[1] // units
    flip = np.uint32(0x80808080)
    for tile in prange(-(-outputs // TILE)):
        first, last = tile * TILE, min((tile + 1) * TILE, outputs)
        for b in range(blocks):
            at = b * units
            for n in range(first, last):
                row = rows[n, at : at + 17]
                halves[b, n] = row[0]
                for w in range(8):
                    low, high = np.uint32(row[1 + 2 * w]), np.uint32(row[2 + 2 * w])
                    words[8 * b + w, n] = (low | high << np.uint32(16)) ^ flip


def byte_blocks(rows: Bytes, nbytes: int) -> tuple[Tensor, Tensor]:
    """Q8_0 rows (N, K / 32 * 34) -> words (K / 4, N) int32, scales (K / 32, N) float16."""
    blocks = rows.shape[1] // nbytes
    words = torch.empty(8 * blocks, rows.shape[0], dtype=torch.int32)
    scales = torch.empty(blocks, rows.shape[0], dtype=torch.float16)
    into = words.numpy().view(np.uint32), scales.numpy().view(np.uint16)
    _byte_blocks(rows.view(np.uint16), nbytes // 2, *into)
    return words, scales
