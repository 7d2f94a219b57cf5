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
from quantmill.kernels.cpu.packing import block_range, pack_dense, pack_linear, pack_rounded, stack

if TYPE_CHECKING:
    from quantmill.checkpoint import Checkpoint

HEAD_BITS = "head_bits"  # the option: 8 or 16, for a head that the checkpoint does not quantise
_NORMS = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "query_norm": "self_attn.q_norm",
    "key_norm": "self_attn.k_norm",
}
_SINGLE = {"o": "self_attn.o_proj", "down": "mlp.down_proj"}
_GATED = {"gate": "mlp.gate_proj", "up": "mlp.up_proj"}
_QKV, _GATE_UP = "self_attn.qkv_proj", "mlp.gate_up_proj"  # how phi3 keeps those together
_TOGETHER = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"}


def pack_model(
    checkpoint: Checkpoint, options: dict[str, int]
) -> Iterator[tuple[str, CpuLinear | NDArray[Any]]]:
    """Everything the decoder needs, one item at a time: no more than one layer is in memory twice."""
    return _Packer(checkpoint).items(options[HEAD_BITS])


class _Packer:
    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.quantised: frozenset[str] = frozenset()
        if checkpoint.quant is not None:
            checkpoint.layout  # noqa: B018  # raises for a method that is none of ours
            self.quantised = frozenset(checkpoint.quantized_modules())

    def items(self, head_bits: int) -> Iterator[tuple[str, CpuLinear | NDArray[Any]]]:
        prefix = architecture_of(self.checkpoint.config).blocks_prefix
        for i in range(dimensions(self.checkpoint.config).layers):
            block = f"{prefix}.{i}"
            for name, suffix in _NORMS.items():
                if f"{block}.{suffix}.weight" in self.checkpoint.tensors:
                    yield f"{i}.{name}", self._floats(f"{block}.{suffix}.weight")
            yield from self._queries_keys_values(block, i)
            yield from self._gate_and_up(block, i)
            for name, suffix in _SINGLE.items():
                yield f"{i}.{name}", self._linear(f"{block}.{suffix}")
        yield "norm", self._floats("model.norm.weight")
        yield "embedding", self._stored("model.embed_tokens.weight")
        yield "head", self._head(head_bits)

    def _queries_keys_values(self, block: str, i: int) -> Iterator[tuple[str, CpuLinear]]:
        if self._has(f"{block}.{_QKV}"):
            yield f"{i}.qkv", self._linear(f"{block}.{_QKV}")
            return
        parts = {name: self._linear(f"{block}.{suffix}") for name, suffix in _TOGETHER.items()}
        whole = stack(list(parts.values()))
        if whole is not None:
            yield f"{i}.qkv", whole
            return
        for name, part in parts.items():
            yield f"{i}.{name}", part

    def _gate_and_up(self, block: str, i: int) -> Iterator[tuple[str, CpuLinear]]:
        if self._has(f"{block}.{_GATE_UP}"):
            both = self._linear(f"{block}.{_GATE_UP}")
            yield f"{i}.gate", block_range(both, 0, both.blocks // 2)
            yield f"{i}.up", block_range(both, both.blocks // 2, both.blocks)
            return
        for name, suffix in _GATED.items():
            yield f"{i}.{name}", self._linear(f"{block}.{suffix}")

    def _has(self, module: str) -> bool:
        return module in self.quantised or f"{module}.weight" in self.checkpoint.tensors

    def _linear(self, module: str) -> CpuLinear:
        if module in self.quantised:
            return pack_linear(self.checkpoint.packed(module))
        biased = f"{module}.bias" in self.checkpoint.tensors
        bias = self._floats(f"{module}.bias") if biased else None
        return pack_dense(self._floats(f"{module}.weight"), bias)

    def _head(self, bits: int) -> CpuLinear:
        own = "lm_head"
        if own in self.quantised:
            return pack_linear(self.checkpoint.packed(own))
        tied = dimensions(self.checkpoint.config).tied or not self._has(own)
        weight = self._floats(f"{'model.embed_tokens' if tied else own}.weight")
        return pack_dense(weight) if bits == DENSE else pack_rounded(weight)

    def _floats(self, name: str) -> NDArray[np.float32]:
        values: NDArray[np.float32] = self.checkpoint.load(name).float().numpy()
        return values

    def _stored(self, name: str) -> NDArray[Any]:
        """float16 as it is, bfloat16 as its bits, float32 as it is."""
        import torch

        tensor = self.checkpoint.load(name)
        bits = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
        array: NDArray[Any] = bits.numpy()
        return array
