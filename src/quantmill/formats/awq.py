"""AWQ's GEMM layout <-> the project's packed linear, code for code. Knows no file, no model, no search.

    qweight  int32   (K, N / 8)    eight 4-bit codes of neighbouring *outputs* in a word, in AWQ's order
    qzeros   int32   (K / G, N / 8) true zero points, packed alike
    scales   float16 (K / G, N)
    bias     float16 (N,)          where the layer has one

Nibble i (bits 4 i to 4 i + 3) of word c belongs to column 8 c + ORDER[i]. There is no g_idx: groups are
consecutive. Source: AutoAWQ's `WQLinear_GEMM.from_linear` and GPTQModel's `packing_utils.py`
(research/quantizers.md 4.3); its siblings gemv, gemv_fast and llm-awq are other layouts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantmill.errors import UnsupportedModel
from quantmill.formats.bits import pack_words, unpack_words
from quantmill.formats.gptq import is_sequential, unpack_zeros
from quantmill.types import CheckpointFormat, PackedLinear

BITS = 4
PER_WORD = 8
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def tensor_shapes(group_size: int, in_features: int, out_features: int) -> dict[str, tuple[int, ...]]:
    """Suffix -> shape of a linear's tensors."""
    groups = 1 if group_size == -1 else -(-in_features // group_size)
    words = -(-out_features // PER_WORD)
    return {"qweight": (in_features, words), "qzeros": (groups, words), "scales": (groups, out_features)}


def unpack_rows(words: Tensor) -> Tensor:
    """words (R, C) int32 -> codes (R, 8 C) uint8, columns in their natural order."""
    bytes_ = words.contiguous().view(torch.uint8).view(*words.shape, 4)
    stored = torch.stack([bytes_ & 15, bytes_ >> 4], -1).reshape(*words.shape, PER_WORD)
    natural = torch.empty_like(stored)
    natural[..., list(ORDER)] = stored
    return natural.reshape(words.shape[0], -1)


def pack_rows(codes: Tensor) -> Tensor:
    """Undo `unpack_rows`: codes (R, N) uint8 below 16, N % 8 == 0 -> (R, N / 8) int32."""
    assert codes.dtype == torch.uint8, "codes are bytes"
    stored = codes.reshape(codes.shape[0], -1, PER_WORD)[..., list(ORDER)]
    packed = stored[..., 0::2] | stored[..., 1::2] << 4
    return packed.contiguous().view(torch.int32).view(codes.shape[0], -1)


def to_packed(qweight: Tensor, qzeros: Tensor, scales: Tensor, bias: Tensor | None) -> PackedLinear:
    """The same linear in the project's layout (GPTQ v2, which stores true zeros), nothing rounded.

    Tensors as in the file; on the CPU a compiled loop transposes the nibbles, elsewhere torch does.
    """
    in_features, out_features = qweight.shape[0], scales.shape[1]
    group = -(-in_features // scales.shape[0])
    zeros = unpack_rows(qzeros)
    return PackedLinear(
        qweight=transpose_words(qweight),
        qzeros=pack_words(zeros.T, BITS).T.contiguous(),
        scales=scales,
        g_idx=torch.arange(in_features, dtype=torch.int32, device=qweight.device) // group,
        bias=bias,
        bits=BITS,
        group_size=-1 if scales.shape[0] == 1 else group,
        in_features=in_features,
        out_features=out_features,
        checkpoint_format=CheckpointFormat.GPTQ_V2,
    )


def transpose_words(qweight: Tensor) -> Tensor:
    """AWQ words (K, N / 8) int32 -> GPTQ words (K / 8, N) int32 of the same codes."""
    if qweight.device.type == "cpu" and qweight.shape[0] % PER_WORD == 0:
        from quantmill.formats.repack_numba import awq_to_gptq

        return awq_to_gptq(qweight)
    return transpose_words_torch(qweight)


def transpose_words_torch(qweight: Tensor) -> Tensor:
    """The slow twin of the compiled loop."""
    return pack_words(unpack_rows(qweight), BITS)


def from_packed(packed: PackedLinear) -> dict[str, Tensor]:
    """Tensors of an AWQ file, bit for bit the same codes, zeros and scales.

    Raises UnsupportedModel where the layout cannot hold the linear: other bit widths, groups that follow
    an act order or do not divide the inputs, outputs that are no multiple of 8.
    """
    if reason := refusal(packed):
        raise UnsupportedModel(f"AWQ cannot hold it: {reason}")
    codes = unpack_words(packed.qweight, BITS, packed.in_features).contiguous()
    zeros = unpack_zeros(packed.qzeros, BITS, packed.out_features, packed.checkpoint_format)
    tensors = {
        "qweight": pack_rows(codes),
        "qzeros": pack_rows(zeros.T.contiguous()),
        "scales": packed.scales.contiguous(),
    }
    return tensors if packed.bias is None else tensors | {"bias": packed.bias}


def refusal(packed: PackedLinear) -> str | None:
    """Why AWQ's layout cannot hold a linear; None where it can."""
    size = packed.in_features if packed.group_size == -1 else packed.group_size
    if packed.bits != BITS:
        return f"it has {packed.bits} bits, AWQ has 4"
    if not is_sequential(packed.g_idx, packed.group_size):
        return "its groups follow an act order (g_idx), AWQ's are consecutive"
    if packed.in_features % size:
        return f"groups of {size} do not divide its {packed.in_features} inputs"
    if packed.out_features % PER_WORD:
        return f"its {packed.out_features} outputs are no multiple of 8"
    return None
