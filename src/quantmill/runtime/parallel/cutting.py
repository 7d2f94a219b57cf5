"""A part of a packed linear: some of its outputs, or some of its inputs. Pure functions of tensors.

For all bits, group sizes and orders: codes are moved, scales and zero points copied, nothing is rounded. Inputs
that share a group with inputs elsewhere take a copy of its scales along.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quantmill.formats.bits import pack_words, unpack_words
from quantmill.formats.gptq import is_sequential, unpack_zeros
from quantmill.types import CheckpointFormat, PackedLinear

POWERS = (16, 32, 64, 128, 256, 512, 1024)  # columns for which a GPU's kernels can have one scale


def take_outputs(packed: PackedLinear, index: Tensor) -> PackedLinear:
    """Outputs `index` (n,) int64, in that order."""
    zeros = unpack_zeros(packed.qzeros, packed.bits, packed.out_features, packed.checkpoint_format)
    return replace(
        packed,
        qweight=packed.qweight.index_select(1, index),
        qzeros=pack_words(zeros.index_select(0, index), packed.bits).T.contiguous(),
        scales=packed.scales.index_select(1, index),
        bias=None if packed.bias is None else packed.bias.index_select(0, index),
        out_features=len(index),
        checkpoint_format=CheckpointFormat.GPTQ_V2,
    )


def take_inputs(packed: PackedLinear, index: Tensor) -> PackedLinear:
    """Inputs `index` (k,) int64, in that order, with the groups that they need. The bias stays."""
    groups, g_idx = torch.unique(packed.g_idx.index_select(0, index), return_inverse=True)
    g_idx = g_idx.to(torch.int32)
    return replace(
        packed,
        qweight=_words_of(packed, index),
        qzeros=packed.qzeros.index_select(0, groups),
        scales=packed.scales.index_select(0, groups),
        g_idx=g_idx,
        group_size=_group_size(packed, g_idx),
        in_features=len(index),
    )


def _words_of(packed: PackedLinear, index: Tensor) -> Tensor:
    """qweight of some inputs: rows of words as they lie where they begin and end with words, else packed anew."""
    first, count, bits = int(index[0]), len(index), packed.bits
    last = first + count
    whole = first * bits % 32 == 0 and (last * bits % 32 == 0 or last == packed.in_features)
    if whole and torch.equal(index, torch.arange(first, last)):
        return packed.qweight[first * bits // 32 : -(-last * bits // 32)]
    codes = unpack_words(packed.qweight, bits, packed.in_features)
    return pack_words(codes.T.index_select(1, index).T, bits)


def _group_size(packed: PackedLinear, g_idx: Tensor) -> int:
    """As before where groups are still whole and consecutive; else the one with which least is held."""
    size = packed.group_size
    if size == -1 or is_sequential(g_idx, size):
        return size
    counts = torch.bincount(g_idx.long())

    def held(power: int) -> int:  # bits of codes and scales, every group filled up to a multiple of `power`
        return int((-(-counts // power)).sum()) * (power * packed.bits + 16)

    return min((p for p in POWERS if p <= max(size, POWERS[0])), key=held)
