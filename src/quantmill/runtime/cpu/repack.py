"""Checkpoint -> the named linears and arrays of a store: the only part of the CPU decoder that loads torch.

Names: `0.qkv` (or `0.q`, `0.k`, `0.v` where they cannot be one), `0.o`, `0.gate`, `0.up`, `0.down`, `head`;
arrays `0.attention_norm`, `0.mlp_norm`, `0.query_norm`, `0.key_norm`, `norm`, `embedding` (float16, or
bfloat16 as int16).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quantmill.architectures import architecture_of, dimensions
from quantmill.kernels.cpu.layout import DENSE, CpuLinear
from quantmill.kernels.cpu.packing import pack_dense, pack_linear, pack_rounded, stack

if TYPE_CHECKING:
    from quantmill.checkpoint import Checkpoint

HEAD_BITS = "head_bits"  # the option: 8 or 16, for a head that the checkpoint does not quantise
_NORMS = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "query_norm": "self_attn.q_norm",
    "key_norm": "self_attn.k_norm",
}
_SINGLE = {"o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
_TOGETHER = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"}


def pack_model(
    checkpoint: Checkpoint, options: dict[str, int]
) -> Iterator[tuple[str, CpuLinear | NDArray[Any]]]:
    """Everything the decoder needs, one item at a time: no more than one layer is in memory twice."""
    prefix = architecture_of(checkpoint.config).blocks_prefix
    for i in range(dimensions(checkpoint.config).layers):
        block = f"{prefix}.{i}"
        for name, suffix in _NORMS.items():
            if f"{block}.{suffix}.weight" in checkpoint.tensors:
                yield f"{i}.{name}", _floats(checkpoint, f"{block}.{suffix}.weight")
        yield from _queries_keys_values(checkpoint, block, i)
        for name, suffix in _SINGLE.items():
            yield f"{i}.{name}", _linear(checkpoint, f"{block}.{suffix}")
    yield "norm", _floats(checkpoint, "model.norm.weight")
    yield "embedding", _stored(checkpoint, "model.embed_tokens.weight")
    yield "head", _head(checkpoint, options[HEAD_BITS])


def _queries_keys_values(checkpoint: Checkpoint, block: str, i: int) -> Iterator[tuple[str, CpuLinear]]:
    parts = {name: _linear(checkpoint, f"{block}.{suffix}") for name, suffix in _TOGETHER.items()}
    whole = stack(list(parts.values()))
    if whole is not None:
        yield f"{i}.qkv", whole
        return
    for name, part in parts.items():
        yield f"{i}.{name}", part


def _linear(checkpoint: Checkpoint, module: str) -> CpuLinear:
    if f"{module}.qweight" in checkpoint.tensors:
        return pack_linear(checkpoint.packed(module))
    bias = f"{module}.bias"
    return pack_dense(
        _floats(checkpoint, f"{module}.weight"),
        _floats(checkpoint, bias) if bias in checkpoint.tensors else None,
    )


def _head(checkpoint: Checkpoint, bits: int) -> CpuLinear:
    if "lm_head.qweight" in checkpoint.tensors:
        return pack_linear(checkpoint.packed("lm_head"))
    own = "lm_head.weight"
    tied = dimensions(checkpoint.config).tied or own not in checkpoint.tensors
    weight = _floats(checkpoint, "model.embed_tokens.weight" if tied else own)
    return pack_dense(weight) if bits == DENSE else pack_rounded(weight)


def _floats(checkpoint: Checkpoint, name: str) -> NDArray[np.float32]:
    values: NDArray[np.float32] = checkpoint.load(name).float().numpy()
    return values


def _stored(checkpoint: Checkpoint, name: str) -> NDArray[Any]:
    """float16 as it is, bfloat16 as its bits, float32 as it is."""
    import torch

    tensor = checkpoint.load(name)
    array: NDArray[Any] = (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array
