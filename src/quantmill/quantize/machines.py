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
    fused_refit: Callable[[int], bool]  # whether refit has a kernel for groups of that many columns


def machine_of(device: torch.device) -> Machine:
    """The row for a device."""
    return {"cpu": _cpu, "cuda": _cuda}.get(device.type, _plain)()


@functools.cache
def _plain() -> Machine:
    from quantmill.quantize.columns import round_columns_torch
    from quantmill.quantize.descent import descend_block_torch
    from quantmill.quantize.grids import fit_groups_torch

    return Machine("torch", round_columns_torch, fit_groups_torch, descend_block_torch, lambda _: False)


@functools.cache
def _cpu() -> Machine:
    from quantmill.quantize.columns_numba import round_columns_numba
    from quantmill.quantize.descent_numba import descend_block_numba
    from quantmill.quantize.grids_numba import fit_groups

    return Machine("numba", round_columns_numba, fit_groups, descend_block_numba, lambda _: False)


@functools.cache
def _cuda() -> Machine:
    """Triton's kernels, each of them only if it gives here what its torch twin gives."""
    from quantmill.quantize import columns_triton, descent_triton, grids_triton, trials

    plain = _plain()
    columns, descend, fit = (
        columns_triton.round_columns_triton,
        descent_triton.descend_block_triton,
        grids_triton.fit_groups,
    )
    return Machine(
        "triton",
        columns if trials.columns_agree(columns) else plain.round_columns,
        fit if trials.grids_agree(fit) else plain.fit_groups,
        descend if trials.descent_agrees(descend) else plain.descend_block,
        functools.cache(trials.products_agree),
    )
