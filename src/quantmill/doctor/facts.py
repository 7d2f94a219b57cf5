"""What there is to know of a folder, measured once: per module and for the rest. Judges nothing.

The tensors of one module at a time are in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from quantmill.architectures import LinearShape, architecture_of, dimensions, linear_shapes
from quantmill.checkpoint import Checkpoint
from quantmill.errors import BadCheckpoint, UnsupportedModel
from quantmill.formats.dialects import Layout
from quantmill.formats.gptq import is_sequential, probe_format, unpack_zeros
from quantmill.packed import SUFFIXES
from quantmill.types import CheckpointFormat, QuantConfig

ELEMENTS_AT_ONCE = 1 << 22
FLOATS = ("F16", "BF16", "F32", "F64")


class Order(StrEnum):
    """What a module's g_idx does."""

    MISSING = "missing"
    SEQUENTIAL = "sequential"  # k // G: needs no g_idx
    PERMUTED = "permuted"  # as many columns a group as in a sequential one, elsewhere
    UNEVEN = "uneven"  # groups of other sizes
    OUT_OF_RANGE = "out of range"


@dataclass(frozen=True, slots=True)
class ModuleFacts:
    """What one quantised module's tensors say. Counts are of elements, 0 where `faults` forbade a look."""

    name: str
    faults: tuple[str, ...]  # headers against config
    in_features: int = 0
    out_features: int = 0
    groups: int = 0
    order: Order | None = None
    zero_format: CheckpointFormat | None = None  # by the probe where symmetric, else the label
    odd_zeros: int = 0  # symmetric by the config, yet not the middle
    wrapped_zeros: int = 0  # v1 fields of all ones, in which readers disagree
    scales_dtype: str = "F16"
    broken_scales: int = 0  # NaN or infinite
    overflowing: int = 0  # scales and biases too large for float16
    zero_scales: int = 0
    broken_bias: int = 0


@dataclass(frozen=True, slots=True)
class Expected:
    """What the architecture's row asks for."""

    linears: dict[str, LinearShape]  # by full module name
    tensors: tuple[str, ...]  # of the rest
    tied: bool


@dataclass(frozen=True, slots=True)
class Facts:
    """A folder, measured."""

    checkpoint: Checkpoint
    config: QuantConfig | None
    config_fault: str | None  # why `config` is None, where there should be one
    modules: tuple[ModuleFacts, ...]
    expected: Expected | None
    expected_fault: str | None
    broken_tensors: tuple[str, ...]  # unquantised ones with NaN or infinite values

    @property
    def quantized(self) -> bool:
        """Whether the folder means to be a quantised model."""
        return self.checkpoint.quant is not None or bool(self.checkpoint.quantized_modules())


def gather(checkpoint: Checkpoint) -> Facts:
    """Read everything the rules ask for."""
    config, config_fault = _config(checkpoint)
    expected, expected_fault = _expected(checkpoint)
    modules = checkpoint.quantized_modules() if config else ()
    configs = {name: checkpoint.module_config(name) for name in modules}
    return Facts(
        checkpoint=checkpoint,
        config=config,
        config_fault=config_fault,
        modules=tuple(_module(checkpoint, configs[name], name) for name in modules),
        expected=expected,
        expected_fault=expected_fault,
        broken_tensors=tuple(_broken_tensors(checkpoint)),
    )


def _config(checkpoint: Checkpoint) -> tuple[QuantConfig | None, str | None]:
    if checkpoint.quant is None and checkpoint.quantized_modules():
        return None, "modules are packed, but no config says how: download quantize_config.json, too"
    try:
        return checkpoint.quant_config, None
    except (BadCheckpoint, UnsupportedModel) as error:
        return None, str(error)


def _expected(checkpoint: Checkpoint) -> tuple[Expected | None, str | None]:
    try:
        row = architecture_of(checkpoint.config)
        shapes = linear_shapes(checkpoint.config)
        sizes = dimensions(checkpoint.config)
    except (BadCheckpoint, UnsupportedModel) as error:
        return None, str(error)
    blocks = [f"{row.blocks_prefix}.{i}" for i in range(sizes.layers)]
    outer = row.blocks_prefix.rpartition(".")[0]
    norms = [f"{b}.{n}.weight" for b in blocks for n in ("input_layernorm", "post_attention_layernorm")]
    head = () if sizes.tied else ("lm_head.weight",)
    return Expected(
        linears={f"{b}.{m}": shape for b in blocks for m, shape in shapes.items()},
        tensors=(f"{outer}.embed_tokens.weight", *norms, f"{outer}.norm.weight", *head),
        tied=sizes.tied,
    ), None


def _module(checkpoint: Checkpoint, config: QuantConfig, name: str) -> ModuleFacts:
    try:
        faults = tuple(checkpoint.module_faults(name))
        in_features, out_features = checkpoint.module_size(name)
    except BadCheckpoint as error:
        return ModuleFacts(name, (str(error).removeprefix(f"{name}."),))
    if faults:
        return ModuleFacts(name, faults, in_features, out_features)
    if checkpoint.layout is not Layout.GPTQ:
        return _foreign_module(checkpoint, config, name, (in_features, out_features))
    qzeros = checkpoint.load(f"{name}.qzeros")
    scales = checkpoint.load(f"{name}.scales")
    bias = checkpoint.load(f"{name}.bias") if f"{name}.bias" in checkpoint.tensors else scales[:0]
    zero_format = probe_format(qzeros, config.bits, config.sym, config.zero_format)
    zeros = unpack_zeros(qzeros, config.bits, out_features, zero_format)
    v1 = zero_format is CheckpointFormat.GPTQ
    return ModuleFacts(
        name,
        faults,
        in_features,
        out_features,
        groups=config.groups(in_features),
        order=_order(checkpoint, config, name, in_features),
        zero_format=zero_format,
        odd_zeros=int((zeros != config.sym_zero).sum()) if config.sym else 0,
        wrapped_zeros=int((zeros == 0).sum()) if v1 else 0,
        scales_dtype=checkpoint.tensors[f"{name}.scales"].dtype,
        broken_scales=_broken(scales),
        overflowing=_overflowing(scales) + _overflowing(bias),
        zero_scales=int((scales == 0).sum()),
        broken_bias=_broken(bias),
    )


def _foreign_module(
    checkpoint: Checkpoint, config: QuantConfig, name: str, size: tuple[int, int]
) -> ModuleFacts:
    """A module of AWQ or compressed-tensors, as it is read; its zeros need no label."""
    try:
        packed = checkpoint.packed(name)
    except BadCheckpoint as error:  # scales that overflow float16
        return ModuleFacts(name, (str(error).removeprefix(f"{name}."),), *size)
    return ModuleFacts(
        name,
        (),
        *size,
        groups=config.groups(size[0]),
        order=Order.SEQUENTIAL if is_sequential(packed.g_idx, config.group_size) else Order.PERMUTED,
        zero_format=config.zero_format,
        broken_scales=_broken(packed.scales),
        zero_scales=int((packed.scales == 0).sum()),
        broken_bias=0 if packed.bias is None else _broken(packed.bias),
    )


def _order(checkpoint: Checkpoint, config: QuantConfig, name: str, in_features: int) -> Order:
    if f"{name}.g_idx" not in checkpoint.tensors:
        return Order.MISSING
    g_idx = checkpoint.load(f"{name}.g_idx").long()
    if is_sequential(g_idx, config.group_size):
        return Order.SEQUENTIAL
    groups = config.groups(in_features)
    if int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
        return Order.OUT_OF_RANGE
    sequential = torch.arange(in_features) // config.effective_group(in_features)
    same_sizes = torch.equal(g_idx.bincount(minlength=groups), sequential.bincount(minlength=groups))
    return Order.PERMUTED if same_sizes else Order.UNEVEN


def _broken_tensors(checkpoint: Checkpoint) -> Iterator[str]:
    """Names of unquantised tensors that hold a NaN or an infinite value."""
    packed = {f"{m}.{suffix}" for m in checkpoint.quantized_modules() for suffix in SUFFIXES}
    for name, info in checkpoint.tensors.items():
        if name not in packed and info.dtype in FLOATS and _broken(checkpoint.load(name)):
            yield name


def _broken(tensor: Tensor) -> int:
    """How many values are NaN or infinite."""
    flat = tensor.reshape(-1)
    starts = range(0, flat.numel(), ELEMENTS_AT_ONCE)
    return sum(int((~torch.isfinite(flat[i : i + ELEMENTS_AT_ONCE])).sum()) for i in starts)


def _overflowing(tensor: Tensor) -> int:
    """How many finite values float16 cannot hold."""
    return int((torch.isinf(tensor.half()) & torch.isfinite(tensor)).sum())
