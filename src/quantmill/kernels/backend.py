"""What a row of the backend table is, and what it is asked about. Knows no kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantmill.formats.gptq import is_sequential
from quantmill.kernels.memory import free_memory
from quantmill.types import PackedLinear


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """What a backend may know of a linear before it agrees to serve it: numbers, no tensors."""

    bits: int
    group_size: int  # as configured: -1 or a number of columns
    in_features: int  # K
    out_features: int  # N
    sequential: bool  # g_idx[k] == k // G: no gather needed
    kept_weights: int = 0  # quantised weights that stay prepared together with this layer; 0: one call only


@dataclass(frozen=True, slots=True)
class Backend:
    """One way to multiply by a packed linear.

    supports(spec, device, dtype, rows) -> reason why not, or None. `dtype` is the activations', `rows`
        the most rows that one call brings.
    prepare(packed, dtype) -> state: whatever `matmul` wants ready: repacked words, a dense copy, the
        tensors themselves. Must not change `packed`, whose tensors stay what is written on saving.
    matmul(x (rows, K) dtype, state) -> (rows, N) dtype, contiguous, bias added.
    """

    name: str
    summary: str  # one line for explain()
    supports: Callable[[LinearSpec, torch.device, torch.dtype, int], str | None]
    prepare: Callable[[PackedLinear, torch.dtype], Any]
    matmul: Callable[[Tensor, Any], Tensor]


def spec_of(packed: PackedLinear, kept_weights: int = 0) -> LinearSpec:
    """The numbers of a packed linear; compares `g_idx` with k // G (one sync where it lies on a GPU)."""
    sequential = is_sequential(packed.g_idx, packed.group_size)
    return LinearSpec(
        packed.bits, packed.group_size, packed.in_features, packed.out_features, sequential, kept_weights
    )


def free_bytes(device: torch.device) -> int:
    """Memory that a new tensor on `device` could take; on a CPU within this process's control group."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_memory()
