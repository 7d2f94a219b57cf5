"""A tiled linear times x: few rows on tensor cores straight from the codes, many through a dense copy.

For up to `tuning.most_rows` rows each row's result has the same bits whatever rows come with it, for one GPU and
one table of cuts; above that they are the vendor's product's. A call allocates its output, and its sums where K
is split; it can be captured in a CUDA graph. Calls of one linear on two streams at once are not allowed: they
share its counters. Knows no file and no model.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from quantmill.kernels.triton import tuning
from quantmill.kernels.triton.packing import TiledLinear
from quantmill.kernels.triton.tuning import Cut

_FINEST = 32  # fewest rows of weights that a cut may take: what the counters are made for


@dataclass(frozen=True, slots=True)
class RunnableLinear:
    """Tiles and the counters that the parts of K report to (zeros between calls)."""

    tiled: TiledLinear
    arrived: Tensor  # int32

    @classmethod
    def of(cls, tiled: TiledLinear) -> RunnableLinear:
        blocks = tiled.rows // _FINEST * -(-tuning.MOST_ROWS // tuning.ROWS_OF_X[-1])
        return cls(tiled, torch.zeros(blocks, dtype=torch.int32, device=tiled.words.device))


def matmul(x: Tensor, linear: RunnableLinear) -> Tensor:
    """x (M, K) fp16 or bf16 -> (M, N) in x's dtype, fp32 sums, bias added."""
    if x.shape[0] > tuning.most_rows(linear.tiled):
        return dense_product(x, linear.tiled)
    return tiled_product(x, linear, tuning.cut_for(linear.tiled, x.shape[0]))


def tiled_product(x: Tensor, linear: RunnableLinear, cut: Cut, *, early: bool | None = None) -> Tensor:
    """The product straight from the codes. x (M, K), M <= MOST_ROWS; gives (M, N).

    `early`: start while the kernel before still runs and ask for weights at once (programmatic dependent
    launch); None: where the GPU can, compute capability 9.0 and up.
    """
    from quantmill.kernels.triton.product import product_kernel

    t, rows_of_x = linear.tiled, x.shape[0]
    x = x if x.stride(1) == 1 else x.contiguous()
    y = torch.empty(rows_of_x, t.out_features, dtype=x.dtype, device=x.device)
    if rows_of_x == 0:
        return y
    block = tuning.block_of(rows_of_x)
    grid = (-(-rows_of_x // block), t.rows // cut.rows, cut.parts)
    assert rows_of_x <= tuning.MOST_ROWS, "the counters are made for so many rows"
    assert cut.rows >= _FINEST, "the counters are made for so many blocks"
    sums = y if cut.parts == 1 else x.new_empty(cut.parts, rows_of_x, t.rows, dtype=torch.float32)
    early = can_start_early(x.device) if early is None else early
    product_kernel[grid](
        x,
        t.words,
        t.scales,
        t.scales if t.zeros is None else t.zeros,
        t.scales if t.order is None else t.order,
        t.scales if t.bias is None else t.bias,
        y,
        sums,
        linear.arrived,
        rows_of_x,
        t.out_features,
        t.in_features,
        x.stride(0),
        t.rows,
        t.tiles,
        t.shape.tiles_per_group,
        BITS=t.shape.bits,
        PLACES=t.shape.places,
        GROUP_PLANES=t.shape.group_planes,
        HAS_ZERO=t.zeros is not None,
        HAS_ORDER=t.order is not None,
        HAS_BIAS=t.bias is not None,
        WHOLE=t.tiles * t.shape.columns == t.in_features,
        BF16=x.dtype == torch.bfloat16,
        PARTS=cut.parts,
        BM=block,
        BN=cut.rows,
        ASM=x.device.type == "cuda" and not interpreted(),
        PDL=early,
        AHEAD=cut.ahead,
        num_warps=cut.warps,
        num_stages=cut.stages,
        **({"launch_pdl": True} if early else {}),
    )
    return y


def dense_product(x: Tensor, t: TiledLinear) -> Tensor:
    """The product through a dense copy of the weights, made by this call. x (M, K); gives (M, N)."""
    bias = None if t.bias is None else t.bias.to(x.dtype)
    if t.order is not None:
        x = x.index_select(1, t.order.clamp(min=0).long())
    return torch.nn.functional.linear(x, dense_weight(t, x.dtype), bias)


def dense_weight(t: TiledLinear, dtype: torch.dtype) -> Tensor:
    """The weight (N, K) in `dtype`, each element rounded once. With an order: (N, places), 0 where no input is."""
    from quantmill.kernels.triton.repack import dequantise_kernel

    columns = t.in_features if t.order is None else t.tiles * t.shape.columns
    weight = torch.empty(t.out_features, columns, dtype=dtype, device=t.words.device)
    rows = 64
    dequantise_kernel[(t.tiles, t.rows // rows)](
        t.words,
        t.scales,
        t.scales if t.zeros is None else t.zeros,
        t.scales if t.order is None else t.order,
        weight,
        t.out_features,
        columns,
        t.rows,
        t.shape.tiles_per_group,
        BITS=t.shape.bits,
        PLACES=t.shape.places,
        GROUP_PLANES=t.shape.group_planes,
        HAS_ZERO=t.zeros is not None,
        HAS_ORDER=t.order is not None,
        BF16=dtype == torch.bfloat16,
        BN=rows,
        ASM=weight.device.type == "cuda" and not interpreted(),
    )
    return weight


@functools.cache
def can_start_early(device: torch.device) -> bool:
    """Whether the GPU knows programmatic dependent launch."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python (TRITON_INTERPRET=1), which knows no inline PTX."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
