"""compressed-tensors' "pack-quantized" layout <-> the project's packed linear. Knows no file and no model.

    weight_packed      int32   (N, ceil(K * bits / 32))  codes along the *inputs*, lowest bits first
    weight_scale       float   (N, K / G)
    weight_zero_point  int32   (ceil(N * bits / 32), K / G)  packed along the outputs; asymmetric only
    weight_g_idx       int32   (K,)   only where groups follow an act order
    weight_shape       int64   (2,)   N, K

Codes and zero points are stored with 2^(bits-1) added, so that they are unsigned: the very numbers of a GPTQ
file. `weight_packed` is its `qweight` transposed. Source: the compressed-tensors library (compressors for
"pack-quantized"), which the tests read these tensors with where it is installed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantmill import __version__
from quantmill.errors import UnsupportedModel
from quantmill.formats.bits import pack_words, unpack_words, words_for
from quantmill.formats.gptq import is_sequential, unpack_zeros
from quantmill.types import CheckpointFormat, Json, PackedLinear, QuantConfig

BITS = (4, 8)
FORMAT = "pack-quantized"


def tensor_shapes(config: QuantConfig, in_features: int, out_features: int) -> dict[str, tuple[int, ...]]:
    """Suffix -> shape of a linear's tensors."""
    groups = config.groups(in_features)
    shapes: dict[str, tuple[int, ...]] = {
        "weight_packed": (out_features, words_for(in_features, config.bits)),
        "weight_scale": (out_features, groups),
        "weight_shape": (2,),
    }
    if not config.sym:
        shapes["weight_zero_point"] = (words_for(out_features, config.bits), groups)
    return shapes


def to_packed(
    weight: Tensor,
    scale: Tensor,
    *,
    zero_point: Tensor | None,
    g_idx: Tensor | None,
    bias: Tensor | None,
    config: QuantConfig,
    in_features: int,
) -> PackedLinear:
    """The same linear in the project's layout (v2, which stores true zeros), nothing rounded.

    Tensors as in the file, scale in float16.
    """
    out_features, groups = scale.shape
    zeros = torch.full((out_features, groups), config.sym_zero, dtype=torch.uint8, device=weight.device)
    if zero_point is not None:
        zeros = unpack_words(zero_point, config.bits, out_features)
    columns = torch.arange(in_features, dtype=torch.int32, device=weight.device)
    return PackedLinear(
        qweight=weight.T.contiguous(),
        qzeros=pack_words(zeros.contiguous(), config.bits).T.contiguous(),
        scales=scale.T.contiguous(),
        g_idx=columns // config.effective_group(in_features) if g_idx is None else g_idx.to(torch.int32),
        bias=bias,
        bits=config.bits,
        group_size=config.group_size,
        in_features=in_features,
        out_features=out_features,
        checkpoint_format=CheckpointFormat.GPTQ_V2,
    )


def from_packed(packed: PackedLinear, sym: bool) -> dict[str, Tensor]:
    """Tensors of a compressed-tensors file, the same codes, zeros and scales.

    Raises UnsupportedModel for other bit widths and for groups that do not divide the inputs.
    """
    if reason := refusal(packed):
        raise UnsupportedModel(f"compressed-tensors cannot hold it: {reason}")
    tensors = {
        "weight_packed": packed.qweight.T.contiguous(),
        "weight_scale": packed.scales.T.contiguous(),
        "weight_shape": torch.tensor([packed.out_features, packed.in_features]),
    }
    if not sym:
        zeros = unpack_zeros(packed.qzeros, packed.bits, packed.out_features, packed.checkpoint_format)
        tensors["weight_zero_point"] = pack_words(zeros, packed.bits)
    if not is_sequential(packed.g_idx, packed.group_size):
        tensors["weight_g_idx"] = packed.g_idx
    return tensors if packed.bias is None else tensors | {"bias": packed.bias}


def refusal(packed: PackedLinear) -> str | None:
    """Why the layout cannot hold a linear; None where it can."""
    size = packed.in_features if packed.group_size == -1 else packed.group_size
    if packed.bits not in BITS:
        return f"it has {packed.bits} bits, pack-quantized has 4 or 8"
    if packed.in_features % size:
        return f"groups of {size} do not divide its {packed.in_features} inputs"
    return None


def config_to_json(config: QuantConfig, ignore: list[str]) -> Json:
    """The `quantization_config` of a compressed-tensors folder; `ignore` are linears left unquantised."""
    channel = config.group_size == -1
    weights = {
        "num_bits": config.bits,
        "type": "int",
        "symmetric": config.sym,
        "strategy": "channel" if channel else "group",
        "group_size": None if channel else config.group_size,
        "actorder": None,
        "dynamic": False,
        "observer": "minmax",
        "observer_kwargs": {},
        "block_structure": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": None,
                "output_activations": None,
            }
        },
        "ignore": ignore,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "quantizer": f"quantmill:{__version__}",
    }
