"""A tiled linear times x: few rows straight from the codes, more on the large tensor instructions, through a dense
copy where that is faster.

Up to `tuning.same_bits_up_to()` rows each row's result has the same bits whatever rows come with it, for one GPU
and one table of cuts; above, as long as the cut is the same. A call allocates its output, and its sums where K is
split; it can be captured in a CUDA graph. Calls of one linear on two streams at once are not allowed: they share
its counters. Knows no file and no model.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantmill.kernels.triton import tuning
from quantmill.kernels.triton.copying import fast_copy, plain_copy
from quantmill.kernels.triton.ends import End, Gated, Norm, Plain, Residual
from quantmill.kernels.triton.packing import TILE, WIDE, TiledLinear
from quantmill.kernels.triton.proof import agree, usable
from quantmill.kernels.triton.tuning import Cut, WideCut

# Rows of x with which each path is tried: every number of blocks, and a last one that is not full.
FEW_TRIED = (1, 5, 16, 40)
DENSE_TRIED = (3,)


@dataclass(frozen=True, slots=True)
class RunnableLinear:
    """Tiles, and the counters that the parts of K report to (zeros between calls)."""

    tiled: TiledLinear
    arrived: Tensor  # int32

    @classmethod
    def of(cls, tiled: TiledLinear) -> RunnableLinear:
        device = tiled.words.device
        programs = max(tiled.rows // TILE * -(-tuning.MOST_COUNTED // 8), tuning.MOST_SHARED)
        return cls(tiled, torch.zeros(programs, dtype=torch.int32, device=device))


def matmul(x: Tensor, linear: RunnableLinear) -> Tensor:
    """x (M, K) fp16 or bf16 -> (M, N) in x's dtype, fp32 sums, bias added."""
    t, rows = linear.tiled, x.shape[0]
    if not has_gluon(x.device):
        return dense_product(x, t)
    same = rows <= tuning.same_bits_up_to()
    if not same and _wide_cut(x, linear) is not None:
        return many_product(x, linear)
    if (same or rows <= tuning.MOST_FEW) and usable("few", t, x.dtype, FEW_TRIED, few_product):
        return _few_blocks(x, linear)
    return many_product(x, linear)


def _few_blocks(x: Tensor, linear: RunnableLinear) -> Tensor:
    """`few_product` of any number of rows: every row has the bits it has alone."""
    if x.shape[0] <= tuning.MOST_FEW:
        return few_product(x, linear)
    return torch.cat([few_product(block, linear) for block in torch.split(x, tuning.MOST_FEW)])


def many_product(x: Tensor, linear: RunnableLinear) -> Tensor:
    """The same for rows that come together anyway: a row's bits may depend on how many there are.

    Not where $QUANTMILL_SAME_BITS is `all`.
    """
    if tuning.same_bits_everywhere() and has_gluon(x.device):
        return matmul(x, linear)
    cut = _wide_cut(x, linear)
    return dense_product(x, linear.tiled) if cut is None else wide_product(x, linear, cut)


def goes_wide(x: Tensor, linear: RunnableLinear) -> bool:
    """Whether `many_product` makes no dense copy for x."""
    return _wide_cut(x, linear) is not None


def _wide_cut(x: Tensor, linear: RunnableLinear) -> WideCut | None:
    """How the kernel for many rows takes x; None: it cannot, it is slower, or it was wrong where it was tried."""
    t = linear.tiled
    cut = tuning.wide_cut(t, x.shape[0]) if has_wide(x.device) else None
    if cut is None or _right(x, linear, cut):
        return cut
    simple = tuning.simple_wide(x.shape[0])
    return simple if simple != cut and _right(x, linear, simple) else None


def _right(x: Tensor, linear: RunnableLinear, cut: WideCut) -> bool:
    """Whether a cut's product is a dense copy's, tried once for a cut and a shape of linear."""
    t = linear.tiled
    path = "simple wide" if cut.stay == tuning.SIMPLE else "wide"
    key = (path, cut, t.shape, t.units, t.zeros is None, t.bias is None, x.dtype, x.device)

    def noise() -> Tensor:  # made when asked for: a captured CUDA graph allows no new generator
        generator = torch.Generator(x.device).manual_seed(0)
        return torch.randn(cut.rows + 3, x.shape[1], device=x.device, generator=generator).to(x.dtype)

    return agree(key, noise, lambda x: wide_product(x, linear, cut), lambda x: dense_product(x, t))


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
    y, launch = _few_call(x, linear, end, norm, cut, early)
    launch.run()
    return y


def warm(x: Tensor, linear: RunnableLinear, cut: Cut | WideCut) -> None:
    """Compile what `few_product` or `wide_product` with this cut runs, and run nothing."""
    if isinstance(cut, Cut):
        _, launch = _few_call(x, linear, None, None, cut, None)
    else:
        from quantmill.kernels.triton.many import wide_call

        _, launch = wide_call(x, linear, cut, None)
    launch.kernel.warmup(*launch.arguments, grid=(launch.programs,), **launch.options)


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel and all that it is called with."""

    kernel: Any
    programs: int
    arguments: tuple[object, ...]
    options: dict[str, object]

    def run(self) -> None:
        if self.programs > 0:
            self.kernel[(self.programs,)](*self.arguments, **self.options)


def _few_call(
    x: Tensor, linear: RunnableLinear, end: End | None, norm: Norm | None, cut: Cut | None, early: bool | None
) -> tuple[Tensor, Launch]:
    t = linear.tiled
    x = readable(x, t)
    rows = x.shape[0]
    end = Plain(torch.empty(rows, t.out_features, dtype=x.dtype, device=x.device)) if end is None else end
    y = end.residual if isinstance(end, Residual) else end.out
    cut = tuning.cut_for(t, rows) if cut is None else cut
    early = can_start_early(x.device) if early is None else early
    programs, sums = _programs(x, linear, cut)
    arguments = (
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
    )
    options: dict[str, object] = {
        **_constants(t, x, cut),
        "END": (Plain, Gated, Residual).index(type(end)),
        "COUNT": 0 if norm is None else norm.squares.shape[1],
        "HAS_POSITION": not isinstance(end, Plain) and end.position is not None,
        "PDL": early,
        **({"launch_pdl": True} if early else {}),
    }
    return y, _staying(t, cut, programs, arguments, options) if cut.stay else _going(
        programs, arguments, options
    )


def _going(programs: int, arguments: tuple[object, ...], options: dict[str, object]) -> Launch:
    from quantmill.kernels.triton.few import few_kernel

    return Launch(few_kernel, programs, arguments, options)


def _staying(
    t: TiledLinear, cut: Cut, programs: int, arguments: tuple[object, ...], options: dict[str, object]
) -> Launch:
    """The same by programs that take one block of rows after the other. x is one block."""
    from quantmill.kernels.triton.held import held_kernel

    span = cut.parts if cut.split else 1
    blocks = t.rows // (TILE * cut.beside * cut.tiles)
    at_once = max(1, tuning.processors(t.words.device) * cut.stay // span) * span
    return Launch(held_kernel, min(programs, at_once), (*arguments, blocks), staying_constants(options))


def staying_constants(options: Mapping[str, object]) -> dict[str, object]:
    """Of what `few_kernel` is compiled for what `held_kernel` is compiled for, too."""
    return {k: v for k, v in options.items() if k not in ("STAGED", "TURNS", "AHEAD", "BLOCKS_AHEAD")}


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
    """The product for many rows on compute capability 9.0. x (M, K); gives (M, N) in x's dtype."""
    from quantmill.kernels.triton.many import wide_call

    y, launch = wide_call(x, linear, cut, early)
    launch.run()
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
    return fast_copy(t, weight) if fast else plain_copy(t, weight)


def _through_fast_copy(x: Tensor, linear: RunnableLinear) -> Tensor:
    t = linear.tiled
    return x @ fast_copy(t, torch.empty(t.out_features, t.in_features, dtype=x.dtype, device=x.device)).T


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
    """Whether the GPU has `wgmma`, compute capability 9.0, and this Triton the names for it."""
    if not has_gluon(device) or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    try:
        from quantmill.kernels.triton import parts, wide  # noqa: F401
    except (ImportError, AttributeError):
        return False
    return True


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python (TRITON_INTERPRET=1), which knows neither Gluon nor PTX."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
