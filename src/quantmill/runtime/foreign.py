"""Modules that hold a foreign layout's tensors while Transformers loads them, then become QuantLinears.

AWQ and compressed-tensors files carry the same codes, zeros and scales as GPTQ's in another order
(formats/). So Transformers loads the tensors of the file as they are, and each module is rearranged in place,
on its device, nothing rounded. Knows no file: shapes and dtypes are handed in.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from quantmill.errors import BadCheckpoint
from quantmill.formats.container import TensorInfo
from quantmill.formats.dialects import Layout
from quantmill.packed import LAYOUTS, Module, module_faults, read_module
from quantmill.runtime.linear import QuantLinear
from quantmill.types import QuantConfig

DTYPES = {
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}


class ForeignLinear(nn.Module):
    """The tensors of one module of a foreign layout, as buffers; it multiplies nothing."""

    def __init__(
        self, name: str, layout: Layout, config: QuantConfig, headers: dict[str, TensorInfo]
    ) -> None:
        super().__init__()
        self.name, self.layout, self.config, self.headers = name, layout, config, headers
        for suffix, info in headers.items():
            self.register_buffer(suffix, torch.zeros(info.shape, dtype=DTYPES[info.dtype], device="meta"))

    def check(self, linear: nn.Linear) -> None:
        """Raises BadCheckpoint where a tensor is missing, or not of the shape that config and model need."""
        faults = module_faults(self.layout, self._module())
        sizes = (linear.in_features, linear.out_features)
        found = LAYOUTS[self.layout].size(self._module())
        if not faults and found != sizes:
            faults = [f"(inputs, outputs) are {found}, the model needs {sizes}"]
        if faults:
            raise BadCheckpoint(f"{self.name}.{faults[0]}: run `quantmill check` on the folder")

    def to_quant_linear(self) -> QuantLinear:
        """The same linear in the layout that multiplies."""
        layer = QuantLinear.from_packed(read_module(self.layout, self._module()))
        layer.training = self.training
        return layer

    def _module(self) -> Module:
        return Module(self.name, self.config, self.headers, self._load)

    def _load(self, suffix: str) -> Tensor:
        buffer: Tensor = getattr(self, suffix)
        return buffer


def tensor_info(dtype: str, shape: tuple[int, ...]) -> TensorInfo:
    """A header's entry without its file."""
    return TensorInfo(Path(), dtype, shape, 0)
