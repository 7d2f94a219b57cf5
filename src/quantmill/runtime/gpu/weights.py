"""A model folder -> what the decoder runs on, on the GPU: linears repacked there, norms in float32.

Queries, keys and values become one linear, gates and ups another. Where `down` reads its inputs in an order of its
own (true act order), the rows of gate and up are put into that order, so that nothing is gathered when it runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantmill.architectures import Dimensions, architecture_of, dimensions
from quantmill.checkpoint import Checkpoint
from quantmill.formats.container import begins as places
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
from quantmill.runtime.gpu.settling import settled
from quantmill.runtime.gpu.upload import EarlyUploader, Stored, Uploader
from quantmill.types import PackedLinear

EARLY = False  # whether a layer is on its way while the one before it is laid out: no faster on an H200
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
    early = _goes_early(checkpoint, device)
    begins = {n: at for file in checkpoint.files for n, at in places(file).items()} if early else {}
    with closing(EarlyUploader(device) if early else Uploader(device)) as upload:
        quantised_ones = frozenset(checkpoint.quantized_modules())
        reader = _Reader(checkpoint, dtype, upload, {} if probed else None, quantised_ones, begins)
        blocks, prefix = [], architecture_of(checkpoint.config).blocks_prefix
        for i in range(settings.sizes.layers):
            reader.ahead(f"{prefix}.{i}.", f"{prefix}.{i + 1}.")
            blocks.append(settled(_block(reader, f"{prefix}.{i}", settings)))
        reader.ahead("lm_head.", "model.embed_tokens.")
        embedding = reader.send("model.embed_tokens.weight").to(dtype)
        head, norm = _head(reader, embedding), reader.floats("model.norm.weight")
    return Weights(embedding, tuple(blocks), norm, head, reader.probes or {})


def _goes_early(checkpoint: Checkpoint, device: torch.device) -> bool:
    """Where tensors go to the GPU as they lie in the file; a rank's share is cut, other layouts rearranged."""
    mapped = type(checkpoint) is Checkpoint and checkpoint.layout is Layout.GPTQ
    return EARLY and mapped and device.type == "cuda"


@dataclass(frozen=True, slots=True)
class _Reader:
    checkpoint: Checkpoint
    dtype: torch.dtype
    upload: Uploader
    probes: dict[str, Probe] | None
    quantised: frozenset[str]  # modules
    begins: dict[str, int]  # where tensors begin in their files; empty where they are not sent ahead

    def send(self, name: str) -> Tensor:
        return self.upload(self.checkpoint.load(name))

    def ahead(self, *starts: str) -> None:
        """Tensors whose names start so will be asked for soon."""
        tensors, begins = self.checkpoint.tensors, self.begins
        found = ((n, t.file) for n, t in tensors.items() if n in begins and n.startswith(starts))
        self.upload.ahead(Stored(self.checkpoint.load(n), file, begins[n]) for n, file in found)

    def floats(self, name: str) -> Tensor:
        return self.send(name).float()

    def optional(self, name: str) -> Tensor | None:
        return self.floats(name) if name in self.checkpoint.tensors else None

    def packed(self, module: str) -> PackedLinear | None:
        """The quantised linear on the device; None where it is dense."""
        if module not in self.quantised:
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
