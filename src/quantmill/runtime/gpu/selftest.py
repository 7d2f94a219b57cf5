"""A model's linears on this GPU beside the reference, on the activations of a few real tokens, when it is opened.

Of every quantised module some outputs are dequantised by formats/gptq.py, straight from the file's tensors. A
module whose kernel gives other numbers is refused by its name. Knows no folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantmill.errors import QuantmillError
from quantmill.formats.gptq import dequantize
from quantmill.types import PackedLinear

OUTPUTS = 32  # of a module that are compared: neighbours, so that their zero points are whole words
TOLERANCE = {torch.float16: 0.01, torch.bfloat16: 0.03}  # of the compared outputs' norm


@dataclass(frozen=True, slots=True)
class Probe:
    """Some outputs of one module, as the file has them."""

    module: str
    columns: Tensor  # (outputs,) int64: which
    weight: Tensor  # (outputs, K) float16
    bias: Tensor | None  # (outputs,) float32


def probe(module: str, packed: PackedLinear) -> Probe:
    """Take the outputs that will be compared, anywhere in the module but the same every time."""
    blocks = packed.out_features // OUTPUTS
    first = hash_of(module) % blocks * OUTPUTS if blocks else 0
    count = min(OUTPUTS, packed.out_features - first)
    words = slice(first * packed.bits // 32, -(-(first + count) * packed.bits // 32))
    some = slice(first, first + count)
    part = replace(
        packed,
        qweight=packed.qweight[:, some].contiguous(),
        qzeros=packed.qzeros[:, words].contiguous(),
        scales=packed.scales[:, some].contiguous(),
        bias=None,
        out_features=count,
    )
    columns = torch.arange(first, first + count, device=packed.qweight.device)
    bias = None if packed.bias is None else packed.bias[some].float()
    return Probe(module, columns, dequantize(part, torch.float16), bias)


def hash_of(module: str) -> int:
    """A number that depends on the name alone."""
    return sum((i + 1) * byte for i, byte in enumerate(module.encode()))


def compare(probes: Sequence[Probe], places: Sequence[Tensor], x: Tensor, y: Tensor, how: str) -> None:
    """x (rows, K) in the modules' own order, y (rows, outputs) of all modules together.

    places: for every probe, where its columns are in y. Raises QuantmillError naming a module that is off.
    """
    for one, at in zip(probes, places, strict=True):
        wanted = x.float() @ one.weight.float().T
        if one.bias is not None:
            wanted += one.bias
        found = y[:, at].float()
        error = float((found - wanted).norm() / wanted.norm().clamp(min=1e-20))
        if not error < TOLERANCE[x.dtype]:
            raise QuantmillError(
                f"{one.module}: its kernel ({how}) is off by {error:.2g} on this GPU, so the model is refused: "
                "use --device cpu, and report it"
            )
