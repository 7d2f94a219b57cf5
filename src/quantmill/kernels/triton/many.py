"""Launches of the kernels for many rows of x on compute capability 9.0: what they are called with and compiled for.

wide.py takes what is shared by several programs or by programs that stay; parts.py the rest, where it is faster.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantmill.kernels.triton import tuning
from quantmill.kernels.triton.linear import Launch, RunnableLinear, can_start_early, readable
from quantmill.kernels.triton.packing import TILE, TiledLinear
from quantmill.kernels.triton.tuning import WideCut


def wide_call(x: Tensor, linear: RunnableLinear, cut: WideCut, early: bool | None) -> tuple[Tensor, Launch]:
    """Where `wide_product` leaves its result, and the launch that makes it."""
    if cut.stay == tuning.SIMPLE:
        return _parts_call(x, linear, cut, early)
    from quantmill.kernels.triton.wide import wide_kernel

    t = linear.tiled
    x = readable(x, t)
    y = torch.empty(x.shape[0], t.out_features, dtype=x.dtype, device=x.device)
    share = tuning.shares(t, x.shape[0], cut)
    assert share.shared <= linear.arrived.numel(), "the counters are made for so many tiles"
    size = 2 * share.programs * TILE * cut.warps * cut.tiles * cut.rows if share.shared else 0
    sums = x.new_empty(size, dtype=torch.float32) if size else t.scales.view(torch.float32)
    early = can_start_early(x.device) if early is None else early
    halves, none = torch.int16, t.scales
    arguments = (
        _blocks_of(x, cut.rows, tuning.STEP), t.words.view(halves), t.scales.view(halves),
        (none if t.zeros is None else t.zeros).view(halves), none if t.bias is None else t.bias,
        _blocks_of(y, min(cut.rows, 64), TILE * cut.warps), sums, linear.arrived, x.shape[0], t.out_features,
        share.tiles, share.shared,
    )  # fmt: skip
    options = wide_constants(t, x.dtype, cut) | {"PDL": early} | ({"launch_pdl": True} if early else {})
    return y, Launch(wide_kernel, share.programs, arguments, options)


def _parts_call(x: Tensor, linear: RunnableLinear, cut: WideCut, early: bool | None) -> tuple[Tensor, Launch]:
    """The same by the kernel in parts.py."""
    from quantmill.kernels.triton.parts import parts_kernel

    t = linear.tiled
    x = readable(x, t)
    y = torch.empty(x.shape[0], t.out_features, dtype=x.dtype, device=x.device)
    turns = t.rows // (TILE * cut.warps * cut.tiles) * -(-x.shape[0] // cut.rows)
    assert cut.parts == 1 or turns <= linear.arrived.numel(), "the counters are made for so many tiles"
    size = 0 if cut.parts == 1 else turns * cut.parts * TILE * cut.warps * cut.tiles * cut.rows
    sums = x.new_empty(size, dtype=torch.float32) if size else t.scales
    early = can_start_early(x.device) if early is None else early
    halves, none = torch.int16, t.scales
    arguments = (
        _blocks_of(x, cut.rows, tuning.STEP), t.words.view(halves), t.scales.view(halves),
        (none if t.zeros is None else t.zeros).view(halves), none if t.bias is None else t.bias, y, sums,
        linear.arrived, x.shape[0], t.out_features, cut.parts,
    )  # fmt: skip
    options = parts_constants(t, x.dtype, cut) | {"PDL": early} | ({"launch_pdl": True} if early else {})
    return y, Launch(parts_kernel, turns * cut.parts, arguments, options)


def _blocks_of(x: Tensor, rows: int, columns: int) -> object:
    """x as the copy engine takes it: blocks of so many rows and columns, zeros beyond its edges."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor.from_tensor(x, [rows, columns], gl.NVMMASharedLayout(128, 16, 2))


def wide_constants(t: TiledLinear, dtype: torch.dtype, cut: WideCut) -> dict[str, object]:
    """What the kernel is compiled for, but for PDL."""
    units = tuning.TURN // t.shape.columns
    # two programs a multiprocessor, or one of twice the warps: registers are short
    twice = cut.tiles == 1 and (cut.rows, cut.warps) in ((128, 8), (128, 16), (64, 8), (64, 16))
    return {
        "UNITS": t.units,
        "BITS": t.shape.bits,
        "GROUP_PLANES": t.shape.group_planes,
        "HAS_ZERO": t.zeros is not None,
        "HAS_BIAS": t.bias is not None,
        "BF16": dtype == torch.bfloat16,
        "WARPS": cut.warps,
        "BT": cut.rows,
        "REPS": cut.tiles,
        "AHEAD": units,
        "DEPTH": max(1, units // 2) if twice and (cut.rows == 128 or t.shape.bits == 8) else units,
        "PIECES": cut.pieces,
        "OPEN": cut.open,
        "num_warps": cut.warps,
        **({"maxnreg": 128} if twice else {}),
    }


def parts_constants(t: TiledLinear, dtype: torch.dtype, cut: WideCut) -> dict[str, object]:
    """The same of the kernel in parts.py."""
    of_wide = wide_constants(t, dtype, cut)
    shared = {name: of_wide[name] for name in of_wide if name not in ("DEPTH", "maxnreg")}
    return shared | {"SPLIT": cut.parts > 1, "STAGES": tuning.TURN // tuning.STEP}
