"""Foreign 4- and 8-bit layouts -> GPTQ's words on a CPU, at the speed of memory. Twins: awq.py, gguf_linear.py.

Each loop reads its input once in order and writes whole cache lines: a tile of 256 outputs at a time where the
input runs along K, so that a kilobyte of every row of words is written together.
"""

# mypy: disable-error-code="no-untyped-def, no-any-unimported"
from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from quantmill.formats.gguf import Bytes

TILE = 256  # outputs: sixteen words are a cache line

_NIBBLES = np.uint64(0x0F0F0F0F0F0F0F0F)
_BYTES = np.uint64(0x00FF00FF00FF00FF)
_WORDS = np.uint64(0x0000FFFF0000FFFF)
_LOW = np.uint64(0xFFFFFFFF)
_FLIP = np.uint64(0x8080808080808080)


def _fresh(*shape: int, dtype: type = np.int32) -> Tensor:
    """New memory that numpy asks the kernel to give in huge pages: half the time would go to page faults."""
    return torch.from_numpy(np.empty(shape, dtype))


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
    out = _fresh(rows // 8, 8 * columns)
    _awq_to_gptq(qweight.contiguous().numpy().view(np.uint32), out.numpy().view(np.uint32))
    return out


@njit(cache=True, inline="always")
def _squeeze(x):
    """Eight nibbles, each alone in its byte -> one word."""
    x = (x | x >> np.uint64(4)) & _BYTES
    x = (x | x >> np.uint64(8)) & _WORDS
    return np.uint32((x | x >> np.uint64(16)) & _LOW)


@njit(cache=True, inline="always")
def _eight(units, at):
    """Four 16-bit units from `at` on as one word of 64 bits."""
    low = np.uint64(units[at]) | np.uint64(units[at + np.uint64(1)]) << np.uint64(16)
    high = np.uint64(units[at + np.uint64(2)]) | np.uint64(units[at + np.uint64(3)]) << np.uint64(16)
    return low | high << np.uint64(32)


# Arrays are flat and indices unsigned: a signed one might count from the end, which costs half the speed.
@njit(cache=True, parallel=True)
def _nibble_blocks(units, outputs, blocks, size, skip, words, halves):
    """Rows of `blocks` blocks of `size` units: `skip` halves, then 16 bytes of nibbles -> words (4 blocks, N)."""
    N, row = np.uint64(outputs), np.uint64(blocks * size)
    for tile in prange(-(-outputs // TILE)):
        first, last = np.uint64(tile * TILE), np.uint64(min((tile + 1) * TILE, outputs))
        for b in range(blocks):
            start = first * row + np.uint64(b * size)
            for h in range(skip):
                at, to = start + np.uint64(h), np.uint64(h * blocks + b) * N
                for n in range(first, last):
                    halves[to + n] = units[at]
                    at += row
            at, to = start + np.uint64(skip), np.uint64(4 * b) * N
            for n in range(first, last):
                x, y, w = _eight(units, at), _eight(units, at + np.uint64(4)), to + n
                words[w] = _squeeze(x & _NIBBLES)
                words[w + N] = _squeeze(y & _NIBBLES)
                words[w + N + N] = _squeeze(x >> np.uint64(4) & _NIBBLES)
                words[w + N + N + N] = _squeeze(y >> np.uint64(4) & _NIBBLES)
                at += row


def nibble_blocks(rows: Bytes, nbytes: int, halves: int) -> tuple[Tensor, Tensor]:
    """Q4_0 (halves 1) or Q4_1 (2) rows (N, K / 32 * nbytes) -> words (K / 8, N) int32, (halves, K / 32, N) f16."""
    outputs, blocks = rows.shape[0], rows.shape[1] // nbytes
    words = _fresh(4 * blocks, outputs)
    stored = _fresh(halves, blocks, outputs, dtype=np.float16)
    into = words.view(-1).numpy().view(np.uint32), stored.view(-1).numpy().view(np.uint16)
    _nibble_blocks(rows.view(np.uint16).reshape(-1), outputs, blocks, nbytes // 2, halves, *into)
    return words, stored


@njit(cache=True, parallel=True)
def _byte_blocks(units, outputs, blocks, size, words, halves):
    """Rows of Q8_0 -> words (8 blocks, N) of codes with 128 added."""
    N, row = np.uint64(outputs), np.uint64(blocks * size)
    for tile in prange(-(-outputs // TILE)):
        first, last = np.uint64(tile * TILE), np.uint64(min((tile + 1) * TILE, outputs))
        for b in range(blocks):
            at, to = first * row + np.uint64(b * size), np.uint64(b) * N
            for n in range(first, last):
                halves[to + n] = units[at]
                w = np.uint64(8 * b) * N + n
                for pair in range(4):
                    x = _eight(units, at + np.uint64(1 + 4 * pair)) ^ _FLIP
                    words[w], words[w + N] = np.uint32(x & _LOW), np.uint32(x >> np.uint64(32))
                    w += N + N
                at += row


def byte_blocks(rows: Bytes, nbytes: int) -> tuple[Tensor, Tensor]:
    """Q8_0 rows (N, K / 32 * 34) -> words (K / 4, N) int32, scales (K / 32, N) float16."""
    outputs, blocks = rows.shape[0], rows.shape[1] // nbytes
    words = _fresh(8 * blocks, outputs)
    scales = _fresh(blocks, outputs, dtype=np.float16)
    into = words.view(-1).numpy().view(np.uint32), scales.view(-1).numpy().view(np.uint16)
    _byte_blocks(rows.view(np.uint16).reshape(-1), outputs, blocks, nbytes // 2, *into)
    return words, scales


@njit(cache=True, parallel=True)
def _whole_zeros(d, m, words, whole):
    groups, outputs = d.shape
    for g in prange(groups):
        fine, word = True, np.uint32(0)
        for n in range(outputs):
            scale, least = np.float64(d[g, n]), np.float64(m[g, n])
            zero = 0.0 if scale == 0.0 else -least / scale
            kept = min(max(np.rint(zero), 0.0), 15.0)
            fine = fine and zero == kept and (scale != 0.0 or least == 0.0)
            word |= np.uint32(kept) << np.uint32(4 * (n & 7))
            if n & 7 == 7 or n == outputs - 1:
                words[g, n >> 3] = word
                word = np.uint32(0)
        whole[g] = fine


def whole_zeros(d: Tensor, m: Tensor) -> Tensor | None:
    """Words (groups, N / 8) int32 of zero points with -d * zero == m exactly, None where one is not whole.

    d, m (groups, N) float16.
    """
    words, whole = _fresh(len(d), -(-d.shape[1] // 8)), np.zeros(len(d), np.bool_)
    _whole_zeros(d.float().numpy(), m.float().numpy(), words.numpy().view(np.uint32), whole)
    return words if bool(whole.all()) else None
