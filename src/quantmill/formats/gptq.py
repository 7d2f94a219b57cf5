"""A solved linear <-> its tensors in a GPTQ file, both zero-point conventions. Knows no model and no folder.

The one place that decides how `qweight`, `qzeros`, `scales` and `g_idx` lie; docs/formats.md is its text.
Dequantised: W[n, k] = scales[g, n] * (codes[n, k] - zeros[n, g]) with g = g_idx[k].
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantmill.errors import BadRequest
from quantmill.formats.bits import pack_words, unpack_words, words_for
from quantmill.formats.config import config_from_json, config_to_json
from quantmill.formats.layout import bits_per_weight, packed_bytes, tensor_shapes
from quantmill.types import CheckpointFormat, IntLinear, PackedLinear, QuantConfig

__all__ = [
    "bits_per_weight",
    "config_from_json",
    "config_to_json",
    "dequantize",
    "is_sequential",
    "pack",
    "pack_words",
    "packed_bytes",
    "probe_format",
    "tensor_shapes",
    "unpack",
    "unpack_words",
    "unpack_zeros",
    "words_for",
]

WEIGHTS_AT_ONCE = 1 << 20  # dequantize's temporaries stay within a few megabytes, whatever the linear's size


def pack(linear: IntLinear, config: QuantConfig, bias: Tensor | None = None) -> PackedLinear:
    """Pack codes, scales and zeros as they are: nothing is rounded again (a bias goes to float16).

    Raises BadRequest where v1 is asked for and a zero point is 0, which v1 cannot hold.
    """
    out_features, in_features = linear.codes.shape
    shapes = tensor_shapes(config.bits, config.group_size, in_features, out_features)
    assert tuple(linear.scales.T.shape) == shapes["scales"], "one scale per output and group"
    assert linear.zeros.shape == linear.scales.shape, "one zero per scale"
    assert linear.scales.dtype == torch.float16, "the solver's scales are final"
    return PackedLinear(
        qweight=pack_words(linear.codes.T, config.bits),
        qzeros=_pack_zeros(linear.zeros, config.bits, config.zero_format),
        scales=linear.scales.T.contiguous(),
        g_idx=linear.g_idx.to(torch.int32).contiguous(),
        bias=None if bias is None else bias.to(torch.float16).contiguous(),
        bits=config.bits,
        group_size=config.group_size,
        in_features=in_features,
        out_features=out_features,
        checkpoint_format=config.zero_format,
    )


def unpack(packed: PackedLinear) -> IntLinear:
    """The linear that `pack` was given, with true zero points."""
    return IntLinear(
        codes=unpack_words(packed.qweight, packed.bits, packed.in_features).T,
        scales=packed.scales.T.contiguous(),
        zeros=unpack_zeros(packed.qzeros, packed.bits, packed.out_features, packed.checkpoint_format),
        g_idx=packed.g_idx,
    )


def dequantize(packed: PackedLinear, dtype: torch.dtype) -> Tensor:
    """The weight (N, K) that the file stands for, each element rounded once, to `dtype`."""
    zeros = unpack_zeros(packed.qzeros, packed.bits, packed.out_features, packed.checkpoint_format).float()
    scales = packed.scales.T.float()  # a product of 11 and 9 bits is exact in float32
    groups = packed.g_idx.long()
    weight = torch.empty(packed.out_features, packed.in_features, dtype=dtype, device=packed.qweight.device)
    step = max(1, WEIGHTS_AT_ONCE // packed.in_features)
    for start in range(0, packed.out_features, step):
        rows = slice(start, start + step)
        codes = unpack_words(packed.qweight[:, rows], packed.bits, packed.in_features).T.float()
        weight[rows] = (codes - zeros[rows].index_select(1, groups)) * scales[rows].index_select(1, groups)
    return weight


def unpack_zeros(qzeros: Tensor, bits: int, out_features: int, checkpoint_format: CheckpointFormat) -> Tensor:
    """True zero points (N, groups) uint8 from qzeros (groups, ceil(N * bits / 32)) int32.

    v1 stores zero - 1. A v1 field of all ones wraps to 0: only a maker that stored 0 - 1 can have left it.
    """
    stored = unpack_words(qzeros.T, bits, out_features).contiguous()
    if checkpoint_format is CheckpointFormat.GPTQ_V2:
        return stored
    return stored.add(1).bitwise_and(2**bits - 1)


def probe_format(qzeros: Tensor, bits: int, sym: bool, label: CheckpointFormat) -> CheckpointFormat:
    """Tell v1 from v2 by the stored zeros: symmetric ones are all 2**(bits-1) - 1 or all 2**(bits-1).

    The majority of the fields decides; asymmetric zeros say nothing: there, and in a tie, the label stands.
    """
    if not sym:
        return label
    fields = unpack_words(qzeros.T, bits, qzeros.shape[1] * 32 // bits)
    middle = 2 ** (bits - 1)
    v1, v2 = int((fields == middle - 1).sum()), int((fields == middle).sum())
    if v1 == v2:
        return label
    return CheckpointFormat.GPTQ if v1 > v2 else CheckpointFormat.GPTQ_V2


def is_sequential(g_idx: Tensor, group_size: int) -> bool:
    """Whether input k belongs to group k // G, so that a reader needs no g_idx."""
    in_features = g_idx.shape[0]
    size = in_features if group_size == -1 else group_size
    expected = torch.arange(in_features, dtype=g_idx.dtype, device=g_idx.device) // size
    return bool(torch.equal(g_idx, expected))


def _pack_zeros(zeros: Tensor, bits: int, checkpoint_format: CheckpointFormat) -> Tensor:
    """zeros (N, groups) uint8, true -> qzeros (groups, ceil(N * bits / 32)) int32."""
    if checkpoint_format is CheckpointFormat.GPTQ:
        if bool((zeros == 0).any()):
            raise BadRequest(
                "a zero point is 0, which checkpoint format gptq (v1) cannot hold: ask for gptq_v2"
            )
        zeros = zeros - 1
    return pack_words(zeros, bits).T.contiguous()
