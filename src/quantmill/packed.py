"""Quantised linears in the files of a folder: one row per layout, found by suffix, checked, read as one type.

Works on a table of tensors and a loader, both handed in; knows no folder and no config file. Loads no torch
until a tensor is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

from quantmill.errors import BadCheckpoint
from quantmill.formats.container import TensorInfo
from quantmill.formats.dialects import Layout
from quantmill.formats.layout import tensor_shapes
from quantmill.types import ActOrder, PackedLinear, QuantConfig

if TYPE_CHECKING:
    from torch import Tensor

FLOATS = ("F16", "BF16", "F32")
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Module:
    """One quantised module: its tensors by suffix, and how to load one of them."""

    name: str
    config: QuantConfig
    tensors: Mapping[str, TensorInfo]  # by suffix
    load: Callable[[str], Tensor]  # by suffix

    def half(self, suffix: str) -> Tensor:
        """A float tensor in float16."""
        return to_half(f"{self.name}.{suffix}", self.load(suffix))

    @property
    def bias(self) -> Tensor | None:
        return self.half("bias") if "bias" in self.tensors else None


@dataclass(frozen=True, slots=True)
class LayoutRow:
    """How one layout is recognised, sized, checked and read."""

    marker: str  # the suffix that every quantised module has
    dtypes: dict[str, tuple[str, ...]]
    optional: tuple[str, ...]
    size: Callable[[Module], tuple[int, int]]  # (in_features, out_features)
    shapes: Callable[[QuantConfig, int, int], Shapes]
    read: Callable[[Module, int, int], PackedLinear]


def module_names(layout: Layout, tensors: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    """Modules that hold packed weights, in the order of the files."""
    ending = f".{LAYOUTS[layout].marker}"
    return tuple(n.removesuffix(ending) for n in tensors if n.endswith(ending))


def module_size(layout: Layout, module: Module) -> tuple[int, int]:
    """(in_features, out_features) from the headers alone."""
    row = LAYOUTS[layout]
    if row.marker not in module.tensors:
        raise BadCheckpoint(f"there is no tensor {module.name}.{row.marker}: download the model again")
    shape = module.tensors[row.marker].shape
    if len(shape) != 2:
        raise BadCheckpoint(
            f"{module.name}.{row.marker} is {shape}; two dimensions are needed: fetch it again"
        )
    return row.size(module)


def module_faults(layout: Layout, module: Module) -> list[str]:
    """What the headers say against a module's tensors: suffix, found, and what the config asks for."""
    row, config = LAYOUTS[layout], module.config
    in_features, out_features = module_size(layout, module)
    shapes = row.shapes(config, in_features, out_features) | {"bias": (out_features,)}
    faults = []
    for suffix, shape in shapes.items():
        info = module.tensors.get(suffix)
        if info is None:
            if suffix not in row.optional:
                faults.append(f"{suffix} is missing")
        elif info.shape != shape:
            asked = f"{config.bits} bits and group size {config.group_size}"
            faults.append(f"{suffix} is {info.shape}; {shape} is needed for {asked}")
        elif info.dtype not in row.dtypes[suffix]:
            faults.append(f"{suffix} is {info.dtype}; {' or '.join(row.dtypes[suffix])} is needed")
    return faults


def read_module(layout: Layout, module: Module) -> PackedLinear:
    """The module as the project's one packed type. Headers have been checked."""
    return LAYOUTS[layout].read(module, *module_size(layout, module))


def g_idx_of(module: Module, in_features: int) -> Tensor:
    """The stored g_idx, or consecutive groups where a maker left it out. Raises BadCheckpoint."""
    import torch

    name, config = f"{module.name}.g_idx", module.config
    groups = config.groups(in_features)
    if "g_idx" not in module.tensors:
        if config.act_order is ActOrder.GROUPED and groups > 1:
            raise BadCheckpoint(
                f"{name} is missing, and desc_act is true: its order is lost, get another file"
            )
        return torch.arange(in_features, dtype=torch.int32) // config.effective_group(in_features)
    g_idx = module.load("g_idx").to(torch.int32)
    low, high = (int(n) for n in g_idx.aminmax())
    if low < 0 or high >= groups:
        raise BadCheckpoint(f"{name} names groups {low} to {high} of {groups}: download the model again")
    return g_idx


def to_half(name: str, tensor: Tensor) -> Tensor:
    """Float16, which every reader computes with. Wider values are rounded, but may not overflow."""
    import torch

    if tensor.dtype == torch.float16:
        return tensor
    half = tensor.to(torch.float16)
    lost = int((torch.isinf(half) & torch.isfinite(tensor)).sum())
    if lost:
        raise BadCheckpoint(
            f"{name} is {tensor.dtype}, {lost} of its values overflow float16: quantise again"
        )
    return half


def _gptq_size(module: Module) -> tuple[int, int]:
    rows, out_features = module.tensors["qweight"].shape
    g_idx = module.tensors.get("g_idx")
    if g_idx is not None and len(g_idx.shape) == 1:
        return g_idx.shape[0], out_features
    return rows * 32 // module.config.bits, out_features  # makers that left g_idx out filled every word


def _gptq_shapes(config: QuantConfig, in_features: int, out_features: int) -> Shapes:
    return tensor_shapes(config.bits, config.group_size, in_features, out_features)


def _read_gptq(module: Module, in_features: int, out_features: int) -> PackedLinear:
    from quantmill.formats.gptq import probe_format

    config = module.config
    qzeros = module.load("qzeros")
    return PackedLinear(
        qweight=module.load("qweight"),
        qzeros=qzeros,
        scales=module.half("scales"),
        g_idx=g_idx_of(module, in_features),
        bias=module.bias,
        bits=config.bits,
        group_size=config.group_size,
        in_features=in_features,
        out_features=out_features,
        checkpoint_format=probe_format(qzeros, config.bits, config.sym, config.zero_format),
    )


def _awq_size(module: Module) -> tuple[int, int]:
    rows, words = module.tensors["qweight"].shape
    return rows, words * 8


def _awq_shapes(config: QuantConfig, in_features: int, out_features: int) -> Shapes:
    groups = config.groups(in_features)
    return {
        "qweight": (in_features, ceil(out_features / 8)),
        "qzeros": (groups, ceil(out_features / 8)),
        "scales": (groups, out_features),
    }


def _read_awq(module: Module, in_features: int, out_features: int) -> PackedLinear:
    from quantmill.formats.awq import to_packed

    return to_packed(module.load("qweight"), module.load("qzeros"), module.half("scales"), module.bias)


def _compressed_size(module: Module) -> tuple[int, int]:
    out_features, words = module.tensors["weight_packed"].shape
    return words * 32 // module.config.bits, out_features


def _compressed_shapes(config: QuantConfig, in_features: int, out_features: int) -> Shapes:
    from quantmill.formats.compressed import tensor_shapes as shapes

    return shapes(config, in_features, out_features)


def _read_compressed(module: Module, in_features: int, out_features: int) -> PackedLinear:
    from quantmill.formats.compressed import to_packed

    def maybe(suffix: str) -> Tensor | None:
        return module.load(suffix) if suffix in module.tensors else None

    return to_packed(
        module.load("weight_packed"),
        module.half("weight_scale"),
        zero_point=maybe("weight_zero_point"),
        g_idx=maybe("weight_g_idx"),
        bias=module.bias,
        config=module.config,
        in_features=in_features,
    )


_INTS = ("I32", "I64")
LAYOUTS = {
    Layout.GPTQ: LayoutRow(
        marker="qweight",
        dtypes={"qweight": ("I32",), "qzeros": ("I32",), "scales": FLOATS, "g_idx": _INTS, "bias": FLOATS},
        optional=("g_idx", "bias"),
        size=_gptq_size,
        shapes=_gptq_shapes,
        read=_read_gptq,
    ),
    Layout.AWQ: LayoutRow(
        marker="qweight",
        dtypes={"qweight": ("I32",), "qzeros": ("I32",), "scales": FLOATS, "bias": FLOATS},
        optional=("bias",),
        size=_awq_size,
        shapes=_awq_shapes,
        read=_read_awq,
    ),
    Layout.COMPRESSED: LayoutRow(
        marker="weight_packed",
        dtypes={
            "weight_packed": ("I32",),
            "weight_scale": FLOATS,
            "weight_zero_point": ("I32",),
            "weight_shape": _INTS,
            "weight_g_idx": _INTS,
            "bias": FLOATS,
        },
        optional=("bias",),
        size=_compressed_size,
        shapes=_compressed_shapes,
        read=_read_compressed,
    ),
}
SUFFIXES = tuple(dict.fromkeys(suffix for row in LAYOUTS.values() for suffix in row.dtypes))
