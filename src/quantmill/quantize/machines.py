"""What solving a linear asks of a device, one row per kind: numba on a CPU, Triton on a GPU, plain torch elsewhere.

Every row has the same signatures; the torch functions are the slow twins that tests hold the others against.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantmill.quantize.grids import Grid

RoundColumns = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]
FitGroups = Callable[[Tensor, Tensor, int, int, Grid, Tensor], tuple[Tensor, Tensor]]
DescendBlock = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Machine:
    """The primitives of one kind of device; arguments and results as their torch twins document them."""

    name: str
    round_columns: RoundColumns  # columns.round_columns_torch
    fit_groups: FitGroups  # grids.fit_groups_torch
    descend_block: DescendBlock  # descent.descend_block_torch
    fused_refit: bool  # refit's group products as a kernel of their own


def machine_of(device: torch.device) -> Machine:
    """The row for a device."""
    return {"cpu": _cpu, "cuda": _cuda}.get(device.type, _plain)()


@functools.cache
def _plain() -> Machine:
    from quantmill.quantize.columns import round_columns_torch
    from quantmill.quantize.descent import descend_block_torch
    from quantmill.quantize.grids import fit_groups_torch

    return Machine("torch", round_columns_torch, fit_groups_torch, descend_block_torch, fused_refit=False)


@functools.cache
def _cpu() -> Machine:
    from quantmill.quantize.columns_numba import round_columns_numba
    from quantmill.quantize.descent_numba import descend_block_numba
    from quantmill.quantize.grids_numba import fit_groups

    return Machine("numba", round_columns_numba, fit_groups, descend_block_numba, fused_refit=False)


@functools.cache
def _cuda() -> Machine:
    from quantmill.quantize.columns_triton import round_columns_triton
    from quantmill.quantize.descent_triton import descend_block_triton
    from quantmill.quantize.grids_triton import fit_groups

    return Machine("triton", round_columns_triton, fit_groups, descend_block_triton, fused_refit=True)
