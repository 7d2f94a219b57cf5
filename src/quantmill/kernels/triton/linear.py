"""A tiled linear times x: few rows straight from the codes, more on the large tensor instructions, many through a
dense copy.

For up to `tuning.MOST_FEW` rows each row's result has the same bits whatever rows come with it, for one GPU and one
table of cuts. A call allocates its output, and its sums where K is split; it can be captured in a CUDA graph. Calls
of one linear on two streams at once are not allowed: they share its counters. Knows no file and no model.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from quantmill.kernels.triton import tuning
from quantmill.kernels.triton.ends import End, Gated, Norm, Plain, Residual
from quantmill.kernels.triton.packing import TILE, WIDE, TiledLinear
from quantmill.kernels.triton.proof import usable
from quantmill.kernels.triton.tuning import Cut, WideCut

# Rows of x with which each path is tried: every number of blocks, and a last one that is not full.
FEW_TRIED = (1, 5, 16, 40)
WIDE_TRIED = (100, 300)
DENSE_TRIED = (3,)


@dataclass(frozen=True, slots=True)
class RunnableLinear:
    """Tiles, and the counters that the parts of K report to (zeros between calls)."""

    tiled: TiledLinear
    arrived: Tensor  # int32

    @classmethod
    def of(cls, tiled: TiledLinear) -> RunnableLinear:
        programs = tiled.rows // TILE * -(-tuning.MOST_FEW // 8)
        return cls(tiled, torch.zeros(programs, dtype=torch.int32, device=tiled.words.device))


def matmul(x: Tensor, linear: RunnableLinear) -> Tensor:
    """x (M, K) fp16 or bf16 -> (M, N) in x's dtype, fp32 sums, bias added."""
    t, rows = linear.tiled, x.shape[0]
    if not has_gluon(x.device):
        return dense_product(x, t)
    if rows <= tuning.MOST_FEW and usable("few", t, x.dtype, FEW_TRIED, few_product):
        return few_product(x, linear)
    cut = tuning.wide_cut(t, rows) if has_wide(x.device) else None
    if cut is not None and usable("wide", t, x.dtype, WIDE_TRIED, _wide_by_rule):
        return wide_product(x, linear, cut)
    return dense_product(x, t)


def _wide_by_rule(x: Tensor, linear: RunnableLinear) -> Tensor:
    cut = tuning.rule_wide(linear.tiled, x.shape[0])
    assert cut is not None, "samples are of a kind that the kernel for many rows takes"
    return wide_product(x, linear, cut)


def few_product(
    x: Tensor,
    linear: RunnableLinear,
    end: End | None = None,
    *,
    norm: Norm | None = None,
    cut: Cut | None = None,
    early: bool | None = None,
) -> Tensor:
    """The product straight from the codes. x (M, K), M <= MOST_FEW, read through the linear's order if it has one.

    Gives what `end` wrote first: y (M, N) in x's dtype without one. `early`: start while the kernel before still
    runs and ask for weights at once (programmatic dependent launch); None: where the GPU can, compute capability
    9.0 and up. Everything but weights is touched when the kernels before are done.
    """
    from quantmill.kernels.triton.few import few_kernel

    t = linear.tiled
    x = readable(x, t)
    rows = x.shape[0]
    end = Plain(torch.empty(rows, t.out_features, dtype=x.dtype, device=x.device)) if end is None else end
    y = end.residual if isinstance(end, Residual) else end.out
    if rows == 0:
        return y
    cut = tuning.cut_for(t, rows) if cut is None else cut
    early = can_start_early(x.device) if early is None else early
    grid, sums = _programs(x, linear, cut)
    few_kernel[(grid,)](
        x.view(torch.int32),
        t.words,
        t.scales,
        t.scales if t.zeros is None else t.zeros,
        t.scales if t.bias is None else t.bias,
        y,
        sums,
        linear.arrived,
        *_end_arguments(end, y),
        y if norm is None else norm.squares,
        rows,
        t.out_features,
        x.stride(0) // 2,
        y.stride(0),
        end.after.stride(0) if isinstance(end, Residual) else 0,
        *_numbers(end, norm),
        **_constants(t, x, cut),
        END=(Plain, Gated, Residual).index(type(end)),
        COUNT=0 if norm is None else norm.squares.shape[1],
        HAS_POSITION=not isinstance(end, Plain) and end.position is not None,
        PDL=early,
        **({"launch_pdl": True} if early else {}),
    )
    return y


def _programs(x: Tensor, linear: RunnableLinear, cut: Cut) -> tuple[int, Tensor]:
    """Programs of a launch, and where they leave their sums if K is split among them."""
    t = linear.tiled
    turns = t.rows // (TILE * cut.beside * cut.tiles) * -(-x.shape[0] // cut.rows)
    if not cut.split:
        return turns, t.scales
    assert turns <= linear.arrived.numel(), "the counters are made for so many programs"
    size = TILE * cut.beside * cut.tiles * cut.rows
    return turns * cut.parts, x.new_empty(turns * cut.parts * size, dtype=torch.float32)


def _end_arguments(end: End, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Position, the next linear's x, its norm's gains, squares; a pointer that is not followed for none."""
    if isinstance(end, Residual):
        return y if end.position is None else end.position, end.after, end.gain, end.squares
    if isinstance(end, Gated) and end.position is not None:
        return end.position, y, y, y
    return y, y, y, y


def _numbers(end: End, norm: Norm | None) -> tuple[float, float, float, float, float]:
    """times, scale, unscale, inverse, epsilon of the kernel."""
    times = end.times if isinstance(end, Residual) else 1.0
    scale = 1.0 if isinstance(end, Plain) else end.scale
    if norm is None:
        return times, scale, 1.0, 1.0, 0.0
    return times, scale, 1.0 / norm.scale, 1.0 / norm.columns, norm.epsilon


def _constants(t: TiledLinear, x: Tensor, cut: Cut) -> dict[str, int | bool]:
    """What the kernel is compiled for."""
    of_program = cut.slices // (cut.parts if cut.split else 1)
    warps = 1 if cut.in_turn else of_program
    units = slice_units(t, cut.slices)
    of_warp = units * of_program // warps
    return {
        "BLOCKS": x.shape[1] // WIDE,
        "UNITS": t.units,
        "BITS": t.shape.bits,
        "GROUP_PLANES": t.shape.group_planes,
        "NARROW": t.shape.narrow,
        "HAS_ZERO": t.zeros is not None,
        "HAS_BIAS": t.bias is not None,
        "BF16": x.dtype == torch.bfloat16,
        "WK": warps,
        "PARTS": cut.parts,
        "SPLIT": cut.split,
        "STAGED": cut.staged,
        "WR": cut.beside,
        "R": cut.tiles,
        "NT": cut.rows // 8,
        "SLICE": units,
        "TURNS": of_program // warps,
        "AHEAD": min(cut.ahead, of_warp),
        "BLOCKS_AHEAD": min(cut.inputs_ahead, of_warp * t.shape.planes // 2),
        "num_warps": warps * cut.beside,
    }


def wide_product(x: Tensor, linear: RunnableLinear, cut: WideCut, *, early: bool | None = None) -> Tensor:
    """The product for many rows on compute capability 9.0, 4 bits. x (M, K); gives (M, N) in x's dtype."""
    from quantmill.kernels.triton.wide import wide_kernel

    t = linear.tiled
    x = readable(x, t)
    y = torch.empty(x.shape[0], t.out_features, dtype=x.dtype, device=x.device)
    turns = t.rows // (TILE * cut.warps * cut.tiles) * -(-x.shape[0] // cut.rows)
    assert cut.parts == 1 or turns <= linear.arrived.numel(), "the counters are made for so many programs"
    size = 0 if cut.parts == 1 else turns * cut.parts * TILE * cut.warps * cut.tiles * cut.rows
    sums = x.new_empty(size, dtype=torch.float32) if size else t.scales
    early = can_start_early(x.device) if early is None else early
    halves, none = torch.int16, t.scales
    wide_kernel[(turns * cut.parts,)](
        x, t.words.view(halves), t.scales.view(halves), (none if t.zeros is None else t.zeros).view(halves),
        none if t.bias is None else t.bias, y, sums, linear.arrived, x.shape[0], t.out_features, x.stride(0),
        UNITS=t.units, GROUP_PLANES=t.shape.group_planes, HAS_ZERO=t.zeros is not None,
        HAS_BIAS=t.bias is not None, BF16=x.dtype == torch.bfloat16, PARTS=cut.parts, WARPS=cut.warps,
        BT=cut.rows, REPS=cut.tiles, AHEAD=cut.ahead, STAGES=cut.stages, PDL=early, num_warps=cut.warps,
        **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return y


def slice_units(t: TiledLinear, slices: int) -> int:
    """Units of one slice of K: the slices begin where groups do, or groups where slices do."""
    units = -(-t.units // slices)
    group = t.shape.group // t.shape.columns
    if t.groups == 1 or group <= 1:
        return units
    if group <= units:
        return -(-units // group) * group
    return 1 << (units - 1).bit_length()


def readable(x: Tensor, t: TiledLinear) -> Tensor:
    """x as the kernels read it: in the order of the places, whole blocks of 32 columns, rows at 16 bytes."""
    if t.order is not None:
        x = placed(x, t)
    if x.shape[1] % WIDE:
        x = torch.nn.functional.pad(x, (0, -x.shape[1] % WIDE))
    whole = x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
    return x if whole else x.clone(memory_format=torch.contiguous_format)


def placed(x: Tensor, t: TiledLinear) -> Tensor:
    """x (M, K) -> (M, places): in a linear's order, 0 at the places that take no input."""
    assert t.order is not None, "the linear has an order"
    return torch.nn.functional.pad(x, (0, 1)).index_select(1, t.order.long() % (t.in_features + 1))


def dense_product(x: Tensor, t: TiledLinear) -> Tensor:
    """The product through a dense copy of the weights, made by this call. x (M, K); gives (M, N)."""
    bias = None if t.bias is None else t.bias.to(x.dtype)
    if t.order is not None:
        x = placed(x, t)
    return torch.nn.functional.linear(x, _dense(t, x.dtype, x.shape[1], None), bias)


def dense_weight(t: TiledLinear, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The weight (N, K) in `dtype`, each element rounded once. With an order: (N, places), 0 where no input is.

    `out`: a contiguous tensor of that shape and type to write into.
    """
    weight = _dense(t, dtype, t.in_features if t.order is None else t.columns, out)
    if t.order is not None:
        weight.masked_fill_(t.order < 0, 0.0)
    return weight


def _dense(t: TiledLinear, dtype: torch.dtype, columns: int, out: Tensor | None) -> Tensor:
    """The same with any finite number where no input is."""
    shape = (t.out_features, columns)
    weight = torch.empty(shape, dtype=dtype, device=t.words.device) if out is None else out
    assert weight.shape == shape, "the tensor to write into fits"
    assert weight.is_contiguous(), "the tensor to write into fits"
    fast = has_gluon(weight.device) and usable("dense", t, dtype, DENSE_TRIED, _through_fast_copy)
    return _dense_fast(t, weight) if fast else _dense_plain(t, weight)


def _through_fast_copy(x: Tensor, linear: RunnableLinear) -> Tensor:
    t = linear.tiled
    return x @ _dense_fast(t, torch.empty(t.out_features, t.in_features, dtype=x.dtype, device=x.device)).T


def _dense_fast(t: TiledLinear, weight: Tensor) -> Tensor:
    from quantmill.kernels.triton.expand import dense_kernel

    warps, halves = 4, torch.int16
    zeros = t.scales if t.zeros is None else t.zeros
    dense_kernel[(t.units, t.rows // (TILE * warps))](
        t.words.view(halves), t.scales.view(halves), zeros.view(halves), weight, *weight.shape,
        t.units, t.groups, t.shape.bits, t.shape.group_planes, t.shape.narrow, t.zeros is not None,
        weight.dtype == torch.bfloat16, warps, num_warps=warps,
    )  # fmt: skip
    return weight


def _dense_plain(t: TiledLinear, weight: Tensor) -> Tensor:
    """The same on any GPU and in the interpreter, slower."""
    from quantmill.kernels.triton.repack import dequantise_kernel

    rows, halves = 64, torch.float16
    zeros = t.scales if t.zeros is None else t.zeros
    dequantise_kernel[(t.units, t.rows // rows)](
        t.words, t.scales.view(halves), zeros.view(halves), weight, *weight.shape,
        t.units, t.groups, t.shape.group, t.shape.bits, t.shape.narrow, t.zeros is not None, rows,
    )  # fmt: skip
    return weight


@functools.cache
def has_gluon(device: torch.device) -> bool:
    """Whether Triton's Gluon is there: it is young, and another Triton may know it otherwise."""
    if device.type != "cuda" or interpreted():
        return False
    try:
        from quantmill.kernels.triton import expand, few  # noqa: F401
    except (ImportError, AttributeError):
        return False
    return True


@functools.cache
def can_start_early(device: torch.device) -> bool:
    """Whether the GPU knows programmatic dependent launch."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def has_wide(device: torch.device) -> bool:
    """Whether the GPU has `wgmma`: compute capability 9.0."""
    return has_gluon(device) and torch.cuda.get_device_capability(device)[0] == 9


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python (TRITON_INTERPRET=1), which knows neither Gluon nor PTX."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
