"""The decoder's kernels as functions of tensors, without the linears. twins.py has each of them in plain torch.

Outputs and scratch are given by the caller, so that a CUDA graph can hold the calls. Knows no model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantmill.kernels.triton.tuning import shared_memory
from quantmill.runtime.gpu.batches import step_sizes
from quantmill.runtime.gpu.launching import launch, power_of_two, starts_early
from quantmill.runtime.gpu.tensors import Gains, Heads, LayerCache, Rows, Scratch
from quantmill.runtime.interface import PAGE

PARTS = 16  # into which a row's text is cut at most
BLOCK = 128  # positions that a row's program takes at once, where a head has at most 128 elements
LEAST = 1  # blocks of a part
# rows of x, outputs, warps, and blocks in shared memory of a dense program; all step through K alike
DENSE_SHAPES = ((16, 64, 4, 5), (32, 64, 4, 5), (64, 64, 4, 4), (128, 128, 8, 3))
POSTED = True  # whether parts of a row wait for the others' words, where the GPU can
ROW_WARPS = 8  # of a row's program: the best for one sequence ...
MANY_WARPS = 4  # ... and for more rows than have the same bits in any batch
ROW_REGISTERS = 0  # of a thread of it at most; 0: any number
TILE_SHAPE = 4, 3
LARGE = 120 << 10  # bytes of shared memory that a program of TILE_SHAPE may take
AHEAD = 2  # blocks that a row's program asks for before it needs them
NEXT = False  # whether one row's program asks for the next layer's first block, too: 0.5 % at best on an H200
TILE = 64  # queries of one program of the tile kernel


def make_scratch(rows: int, heads: Heads, device: torch.device) -> Scratch:
    """For passes of at most so many rows."""
    shape, kind = (rows, heads.kv, PARTS, heads.group), torch.int64 if _posts(device) else torch.float32
    return Scratch(
        torch.zeros(*shape, heads.size, dtype=kind, device=device),
        torch.zeros(*shape, 2, dtype=kind, device=device),
        torch.zeros(rows, heads.kv, dtype=torch.int32, device=device),
    )


def embed_normed(
    residual: Tensor,
    embedding: Tensor,
    tokens: Tensor,
    gain: Tensor,
    epsilon: float,
    order: Tensor | None,
    out: Tensor,
) -> None:
    """residual (rows, K) float32 = embedding[tokens]; out (rows, K or places) = its RMSNorm, gathered."""
    _norm(residual, embedding, tokens, gain, epsilon, order, out, 1.0)


def add_normed(
    residual: Tensor,
    added: Tensor | None,
    gain: Tensor,
    epsilon: float,
    order: Tensor | None,
    out: Tensor,
    *,
    times: float = 1.0,
) -> None:
    """residual += added * times; out = its RMSNorm (float32 inside, rounded once), in a linear's order."""
    _norm(residual, added, None, gain, epsilon, order, out, times)


def _norm(
    residual: Tensor,
    added: Tensor | None,
    tokens: Tensor | None,
    gain: Tensor,
    epsilon: float,
    order: Tensor | None,
    out: Tensor,
    times: float,
) -> None:
    from quantmill.runtime.gpu.kernels.norms import norm_kernel

    rows, k = residual.shape
    places = out.shape[1]
    early = tokens is None and starts_early(out.device)  # a step's first kernel waits for all before it
    norm_kernel[(rows,)](
        residual,
        residual if added is None else added,
        residual if tokens is None else tokens,
        gain,
        residual if order is None else order,
        out,
        k,
        places,
        times,
        EPSILON=epsilon,
        EMBED=tokens is not None,
        HAS_ADDED=added is not None and tokens is None,
        HAS_ORDER=order is not None,
        BLOCK=power_of_two(k),
        BLOCK_OUT=power_of_two(places),
        PDL=early,
        num_warps=8 if k > 2048 else 4,
        **launch(early),
    )


def start(
    residual: Tensor,
    embedding: Tensor,
    tokens: Tensor,
    norm: Gains,
    position: Tensor | None,
    after: Tensor,
    squares: Tensor,
) -> None:
    """residual (rows, K) float32 = embedding[tokens]; after = it * gains * scale, not normed, at `position`;
    squares (rows, K / 16) = sums of the squares of 16 of its columns each."""
    from quantmill.runtime.gpu.kernels.norms import start_kernel

    rows, k = residual.shape
    start_kernel[(rows,)](
        residual,
        embedding,
        tokens,
        norm.gain,
        tokens if position is None else position,
        after,
        squares,
        k,
        after.shape[1],
        norm.scale,
        HAS_POSITION=position is not None,
        BLOCK=power_of_two(k),
        num_warps=8 if k > 2048 else 4,
    )


def gated(gate_up: Tensor, span: int, scale: float, out: Tensor) -> None:
    """out (rows, N) = silu(gate) * up * scale. gate_up (rows, 2 N): `span` gates, their ups, the next gates ...

    Rows of `out` may lie apart."""
    from quantmill.runtime.gpu.kernels.norms import silu_kernel

    rows, n = out.shape
    block = min(1024, power_of_two(n))
    early = starts_early(out.device)
    silu_kernel[(rows, -(-n // block))](
        gate_up, out, n, out.stride(0), scale, SPAN=span, BLOCK=block, PDL=early, num_warps=4, **launch(early)
    )


def write_cache(qkv: Tensor, heads: Heads, cache: LayerCache, rows: Rows) -> None:
    """Keys (turned to their positions) and values of every row into their pages."""
    from quantmill.runtime.gpu.kernels.rotary import cache_kernel

    early = starts_early(qkv.device)
    number = rows.positions.shape[0]
    block = 16 if number >= 256 else 1
    cache_kernel[(-(-number // block), heads.kv)](
        qkv,
        qkv if heads.key_norm is None else heads.key_norm,
        heads.cosines,
        heads.sines,
        *_cache_arguments(cache),
        rows.positions,
        rows.sequences,
        rows.pages,
        rows.pages.stride(0),
        number,
        **_shape(heads),
        FP8=cache.key_scales is not None,
        BLOCK=block,
        PDL=early,
        num_warps=1 if block == 1 else 4,
        **launch(early),
    )


def attend_rows(
    qkv: Tensor,
    heads: Heads,
    cache: LayerCache,
    rows: Rows,
    scratch: Scratch,
    places_of: Tensor | None,
    out: Tensor,
    *,
    writes: bool,
    following: LayerCache | None = None,
) -> None:
    """out (rows, places) = every row's attention over its own text.

    writes: put the rows' keys and values into the cache, too; no two rows may then be of one sequence.
    places_of: (heads * size,) int32, where an element of the result goes. following: the next layer's cache,
    which is asked for on the way where that pays.
    """
    from quantmill.runtime.gpu.kernels.attention import rows_kernel

    number = rows.positions.shape[0]
    early = starts_early(qkv.device)
    warps = ROW_WARPS if number <= step_sizes()[0] else MANY_WARPS
    rows_kernel[(PARTS, heads.kv, number)](
        qkv,
        qkv if heads.query_norm is None else heads.query_norm,
        qkv if heads.key_norm is None else heads.key_norm,
        heads.cosines,
        heads.sines,
        *_cache_arguments(cache),
        rows.positions,
        rows.sequences,
        rows.pages,
        out,
        rows.positions if places_of is None else places_of,
        *((cache.keys, cache.values) if following is None else (following.keys, following.values)),
        scratch.sums,
        scratch.tops,
        scratch.turns,
        heads.reach,
        rows.pages.stride(0),
        out.shape[1],
        LEAST,
        SCALE=heads.size**-0.5,
        **_shape(heads),
        **_row_shape(heads),
        HAS_ORDER=places_of is not None,
        FP8=cache.key_scales is not None,
        POSTED=_posts(qkv.device),
        PACK=_pack(heads, warps),
        WRITES=writes,
        AHEAD=AHEAD,
        NEXT=NEXT and early and number == 1 and following is not None,
        PDL=early,
        num_warps=warps,
        num_stages=1,
        **launch(early, ROW_REGISTERS),
    )


def attend_tiles(
    qkv: Tensor,
    heads: Heads,
    cache: LayerCache,
    tiles: Tensor,
    pages: Tensor,
    places_of: Tensor | None,
    out: Tensor,
    *,
    windowed: bool,
) -> None:
    """The same for many rows of few sequences, whose keys and values are in the cache already.

    tiles: (tiles, 4) int32, at most `tile_rows(heads)` rows each: first row, rows, position of the first row,
    line in `pages`. windowed: whether some row's window begins after position 0.
    """
    from quantmill.runtime.gpu.kernels.attention import tile_kernel

    tile_kernel[(tiles.shape[0], heads.kv)](
        qkv,
        qkv if heads.query_norm is None else heads.query_norm,
        heads.cosines,
        heads.sines,
        *_cache_arguments(cache),
        tiles,
        pages,
        out,
        tiles if places_of is None else places_of,
        heads.reach,
        pages.stride(0),
        out.shape[1],
        SCALE=heads.size**-0.5,
        **_shape(heads),
        ROWS=_tile(heads),
        HAS_ORDER=places_of is not None,
        HAS_WINDOW=windowed and heads.window > 0,
        FP8=cache.key_scales is not None,
        num_warps=TILE_SHAPE[0],
        num_stages=TILE_SHAPE[1] if shared_memory(qkv.device) >= LARGE else 2,
    )


def dense(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    *,
    squares: Tensor | None = None,
    norm: Gains | None = None,
) -> None:
    """y (M, N) = x (M, K) times weight (N, K), fp32 sums; the same bits for a row whatever M is.

    squares and norm: x is as `start` left it, its RMSNorm is made here.
    """
    from quantmill.runtime.gpu.kernels.dense import dense_kernel

    (m, k), n = x.shape, weight.shape[0]
    bm, bn, warps, stages = next(
        shape for shape in DENSE_SHAPES if m <= shape[0] or shape is DENSE_SHAPES[-1]
    )
    early = starts_early(x.device)
    dense_kernel[(-(-m // bm), -(-n // bn))](
        x,
        weight,
        weight if bias is None else bias,
        y if squares is None else squares,
        y,
        m,
        n,
        k,
        1.0 if norm is None else 1 / norm.scale,
        EPSILON=0.0 if norm is None else norm.epsilon,
        COUNT=0 if squares is None else squares.shape[1],
        COUNTS=1 if squares is None else power_of_two(squares.shape[1]),
        HAS_BIAS=bias is not None,
        BM=bm,
        BN=bn,
        BK=64,
        PDL=early,
        num_warps=warps,
        num_stages=stages,
        **launch(early),
    )


def tile_rows(heads: Heads) -> int:
    """Rows of the pass that one tile of `attend_tiles` takes."""
    return _tile(heads) // heads.group


def _posts(device: torch.device) -> bool:
    """Whether parts are posted: the interpreter runs programs one by one, so none can wait for a later one."""
    return POSTED and starts_early(device)


def _pack(heads: Heads, warps: int) -> int:
    """Posted elements that a thread waits for at once: of two slices' worth of columns, what each thread has."""
    return max(1, min(4, 2 * power_of_two(heads.group) * power_of_two(heads.size) // (32 * warps)))


def _tile(heads: Heads) -> int:
    return max(TILE, power_of_two(heads.group))


def _shape(heads: Heads) -> dict[str, int | float | bool]:
    """What every kernel that knows heads and pages is compiled for."""
    return {
        "H": heads.count,
        "KVH": heads.kv,
        "D": heads.size,
        "BLOCK_D": power_of_two(heads.size),
        "PAGE": PAGE,
        "EPSILON": heads.epsilon,
        "HAS_NORM": heads.query_norm is not None,
    }


def _row_shape(heads: Heads) -> dict[str, int]:
    """What a program of `attend_rows` works on."""
    group = power_of_two(heads.group)
    block = max(PAGE, BLOCK if heads.size <= 128 else BLOCK // 2)
    return {"ROWS": max(16, group), "GROUP": group, "PARTS": PARTS, "BLOCK": block}


def _cache_arguments(cache: LayerCache) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pointers; those to scales are not followed where there are none."""
    none = cache.keys
    key_scales = none if cache.key_scales is None else cache.key_scales
    value_scales = none if cache.value_scales is None else cache.value_scales
    return cache.keys, cache.values, key_scales, value_scales
