"""A model folder -> what the decoder runs on, on the GPU: linears repacked there, norms in float32.

Queries, keys and values become one linear, gates and ups another. Where `down` reads its inputs in an order of its
own (true act order), the rows of gate and up are put into that order, so that nothing is gathered when it runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantmill.architectures import Dimensions, architecture_of, dimensions
from quantmill.formats.dialects import Layout
from quantmill.runtime.cpu.settings import Settings
from quantmill.runtime.gpu.projection import (
    SPAN,
    Projection,
    apart,
    part_of,
    quantised,
    reordered,
    unquantised,
)
from quantmill.runtime.gpu.selftest import Probe, probe
from quantmill.runtime.gpu.upload import Uploader
from quantmill.types import PackedLinear

if TYPE_CHECKING:
    from quantmill.checkpoint import Checkpoint

MOST = 60000.0  # what fp16 holds, less some


@dataclass(frozen=True, slots=True)
class Block:
    """One layer."""

    attention_norm: Tensor  # (hidden,) float32
    qkv: Projection
    query_norm: Tensor | None  # (head_dim,) float32
    key_norm: Tensor | None
    output: Projection
    mlp_norm: Tensor
    gate_up: Projection
    down: Projection
    shrink: float  # a power of two: silu(gate) * up is divided by it so that `down` reads no infinities
    reorder: Tensor | None  # (intermediate,): the gate that output i of gate_up is; None: as in the file
    modules: tuple[tuple[tuple[str, int], ...], ...]  # names and outputs in qkv, output, gate_up and down

    @property
    def projections(self) -> tuple[Projection, ...]:
        return self.qkv, self.output, self.gate_up, self.down


@dataclass(frozen=True, slots=True)
class Weights:
    """A model."""

    embedding: Tensor  # (vocab, hidden)
    blocks: tuple[Block, ...]
    norm: Tensor  # (hidden,) float32
    head: Projection
    probes: dict[str, Probe]  # by module; empty where no self-test is wanted

    @property
    def nbytes(self) -> int:
        """What one step of one sequence reads."""
        blocks = sum(p.nbytes for b in self.blocks for p in b.projections)
        return blocks + self.head.nbytes


def read_weights(
    checkpoint: Checkpoint, settings: Settings, device: torch.device, dtype: torch.dtype, probed: bool
) -> Weights:
    """`probed`: take what the self-test compares. Raises BadCheckpoint for what is missing or misshapen."""
    reader = _Reader(checkpoint, dtype, Uploader(device), {} if probed else None)
    prefix = architecture_of(checkpoint.config).blocks_prefix
    embedding = reader.send("model.embed_tokens.weight").to(dtype)
    blocks = tuple(_block(reader, f"{prefix}.{i}", settings) for i in range(settings.sizes.layers))
    head = _head(reader, embedding)
    return Weights(embedding, blocks, reader.floats("model.norm.weight"), head, reader.probes or {})


@dataclass(frozen=True, slots=True)
class _Reader:
    checkpoint: Checkpoint
    dtype: torch.dtype
    upload: Uploader
    probes: dict[str, Probe] | None

    def send(self, name: str) -> Tensor:
        return self.upload(self.checkpoint.load(name))

    def floats(self, name: str) -> Tensor:
        return self.send(name).float()

    def optional(self, name: str) -> Tensor | None:
        return self.floats(name) if name in self.checkpoint.tensors else None

    def packed(self, module: str) -> PackedLinear | None:
        """The quantised linear on the device; None where it is dense."""
        if module not in self.checkpoint.quantized_modules():
            return None
        # Other layouts are rearranged by the processor's compiled loops, from where it goes on as GPTQ does.
        send = self.upload if self.checkpoint.layout is Layout.GPTQ else None
        packed = on_device(self.checkpoint.packed(module, send), self.upload)
        if self.probes is not None:
            self.probes[module] = probe(module, packed)
        return packed

    def together(
        self, modules: Sequence[str], order: Tensor | None = None, woven: bool = False
    ) -> Projection:
        """Modules that share an input; the outputs of each in `order`. `woven`: SPAN of each by turns."""
        packed = [self.packed(m) for m in modules]
        found = [reordered(p, order) for p in packed if p is not None]
        if len(found) == len(modules):
            return quantised(found, SPAN if woven else 0)
        parts = [
            unquantised(*self._dense(m, order)) if p is None else part_of(reordered(p, order))
            for m, p in zip(modules, packed, strict=True)
        ]
        return apart(parts, parts[0].inputs)

    def _dense(self, module: str, order: Tensor | None) -> tuple[Tensor, Tensor | None]:
        weight = self.send(f"{module}.weight").to(self.dtype)
        bias = self.optional(f"{module}.bias")
        if order is not None:
            weight, bias = weight[order.long()], None if bias is None else bias[order.long()]
        return weight, bias


def on_device(packed: PackedLinear, upload: Uploader) -> PackedLinear:
    """The same linear elsewhere."""
    return replace(
        packed,
        qweight=upload(packed.qweight),
        qzeros=upload(packed.qzeros),
        scales=upload(packed.scales),
        g_idx=upload(packed.g_idx),
        bias=None if packed.bias is None else upload(packed.bias),
    )


def _block(reader: _Reader, name: str, settings: Settings) -> Block:
    modules = _modules(name, settings.sizes)
    names = [[module for module, _ in group] for group in modules]
    down = reader.together(names[3])
    order = down.order
    if order is not None and bool((order < 0).any()):  # groups had to be filled up: read through the order
        packed = reader.packed(names[3][0])
        assert packed is not None, "only a quantised linear has an order"
        down, order = apart([part_of(packed)], packed.in_features), None
    output, mlp_norm = reader.together(names[1]), reader.floats(f"{name}.post_attention_layernorm.weight")
    gate_up = reader.together(names[2], order, woven=True)
    return Block(
        attention_norm=reader.floats(f"{name}.input_layernorm.weight"),
        qkv=reader.together(names[0]),
        query_norm=reader.optional(f"{name}.self_attn.q_norm.weight"),
        key_norm=reader.optional(f"{name}.self_attn.k_norm.weight"),
        output=output,
        mlp_norm=mlp_norm,
        gate_up=gate_up,
        down=down,
        shrink=1.0 if reader.dtype == torch.bfloat16 else shrink_for(gate_up, mlp_norm, down),
        reorder=order,
        modules=modules,
    )


def _modules(name: str, sizes: Dimensions) -> tuple[tuple[tuple[str, int], ...], ...]:
    q, kv = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    attention, mlp = f"{name}.self_attn", f"{name}.mlp"
    return (
        ((f"{attention}.q_proj", q), (f"{attention}.k_proj", kv), (f"{attention}.v_proj", kv)),
        ((f"{attention}.o_proj", sizes.hidden),),
        ((f"{mlp}.gate_proj", sizes.intermediate), (f"{mlp}.up_proj", sizes.intermediate)),
        ((f"{mlp}.down_proj", sizes.hidden),),
    )


def shrink_for(gate_up: Projection, norm: Tensor, down: Projection) -> float:
    """The power of two S for which silu(gate) * up / S and what `down` makes of it fit fp16, whatever the text.

    After RMSNorm an input's length is at most sqrt(K) before `norm`, so |gate_n| <= sqrt(K) |W_n * norm|
    (Cauchy and Schwarz), and silu(x) <= x in size; |down_n| <= |W_n * these bounds|, summed without signs.
    """
    gate, up = _lengths(gate_up, norm).view(-1, 2, gate_up.span).unbind(1)
    inner = (gate * up).reshape(-1) * norm.shape[0]
    (part,) = down.parts
    spread = gathered(inner, part.order)
    rows = torch.split(part.dense(torch.float16), 1024)
    most = torch.stack([(w.abs().float() @ spread).max() for w in rows] + [inner.max()]).max()
    return 2.0 ** max(0, math.ceil(math.log2(max(float(most), 1.0) / MOST)))


def _lengths(projection: Projection, gains: Tensor) -> Tensor:
    """|W_n * gains| of every output."""
    found: list[Tensor] = []
    for part in projection.parts:
        own = gathered(gains, projection.order if part.order is None else part.order)
        rows = torch.split(part.dense(torch.float16), 2048)
        found += [torch.linalg.vector_norm(w.float() * own, dim=1) for w in rows]
    return torch.cat(found)


def gathered(vector: Tensor, order: Tensor | None) -> Tensor:
    """The vector in the order of places, 0 where a place has no input."""
    if order is None:
        return vector
    return torch.where(order >= 0, vector[order.clamp(min=0).long()], 0.0)


def _head(reader: _Reader, embedding: Tensor) -> Projection:
    checkpoint = reader.checkpoint
    if "lm_head.qweight" in checkpoint.tensors:
        return reader.together(["lm_head"])
    if dimensions(checkpoint.config).tied or "lm_head.weight" not in checkpoint.tensors:
        return apart([unquantised(embedding, None)], embedding.shape[1])
    return reader.together(["lm_head"])
