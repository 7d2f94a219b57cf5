"""Measure cuts on this GPU and keep the fastest: once for each shape of linear. Knows no file of weights.

Every candidate runs inside a CUDA graph over so many copies of the linear that none is found in the L2 cache.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import torch
from torch import Tensor

from quantmill.kernels.triton import tuning
from quantmill.kernels.triton.linear import (
    RunnableLinear,
    dense_product,
    few_product,
    has_wide,
    slice_units,
    warm,
    wide_product,
)
from quantmill.kernels.triton.packing import TILE, TiledLinear
from quantmill.kernels.triton.tuning import Cut, WideCut

BEYOND_CACHE = 300 << 20  # bytes of copies of one linear: five times the largest L2
LAUNCHES = 20  # at least, in one graph
STAGED_BYTES = 112 << 10  # of x in shared memory: two programs of a multiprocessor at the most
# (warps beside each other, tiles of a warp, units read ahead for one tile) that won somewhere on an H200
SHARES = ((4, 1, 8), (4, 2, 8), (8, 1, 8), (8, 2, 8), (4, 4, 8))
FEW_SHARES = ((1, 1, 8), (1, 2, 16), (1, 1, 4), (1, 2, 8))
# (rows of x, warps): 16 rows of weights a warp
WIDE_SHARES = (
    (256, 8), (128, 8), (128, 16), (64, 8), (64, 16), (64, 4), (32, 8), (32, 16), (32, 4), (16, 8), (16, 16),
)  # fmt: skip


def candidates(linear: TiledLinear, block: int) -> list[Cut]:
    """Cuts worth a measurement for an entry of ROWS_OF_X."""
    found = dict.fromkeys((*_whole(linear, block), *_split(linear, block), *_staying(linear, block)))
    return list(found) or [tuning.rule_cut(linear, block, *tuning.rule_slices(linear))]


def _parts(slices: int) -> list[int]:
    return [p for p in (2, 4, 8, 16) if p <= slices] or [1]


def _whole(linear: TiledLinear, block: int) -> Iterator[Cut]:
    """A program takes all of K."""
    if block > 8:
        return
    slices, _ = tuning.rule_slices(linear)
    tiles = linear.rows // TILE
    for parts, (beside, own, ahead), inputs in itertools.product(_parts(slices), FEW_SHARES, (4, 8)):
        if tiles % (beside * own) == 0:
            units = max(1, ahead // own // linear.shape.words)
            yield Cut(max(8, block), slices, parts, beside, own, units, inputs, False, False)


def _split(linear: TiledLinear, block: int) -> Iterator[Cut]:
    """A program takes one part of K, its x in shared memory."""
    slices, _ = tuning.rule_slices(linear)
    if block <= tuning.ROWS_OF_X[0] or slices < 2:
        return
    tiles, busy = linear.rows // TILE, tuning.processors(linear.words.device)
    for parts, (beside, own, ahead) in itertools.product(_parts(slices), SHARES):
        columns = slice_units(linear, slices) * (slices // parts) * linear.shape.columns
        held = (1 << (columns - 1).bit_length()) * 2 * block
        programs = tiles // (beside * own) * parts
        fits = tiles % (beside * own) == 0 and own * block <= 64 and held <= STAGED_BYTES
        if fits and busy / 2 <= programs <= 14 * busy:
            units = max(1, ahead // own // linear.shape.words)
            yield Cut(block, slices, parts, beside, own, units, 2 if block <= 16 else 1, True, True, True)


def _staying(linear: TiledLinear, block: int) -> Iterator[Cut]:
    """The same by programs that stay, one or two of a multiprocessor."""
    slices, _ = tuning.rule_slices(linear)
    if block not in (8, 16) or slices < 2:
        return
    tiles, unit = linear.rows // TILE, linear.shape.columns
    for parts, beside, own, stay in itertools.product(_parts(slices), (1, 2, 4, 8), (1, 2), (1, 2)):
        of_part = slices // parts
        columns = slice_units(linear, slices) * of_part * unit
        held = (1 << (columns - 1).bit_length()) * 2 * block + of_part * beside * own * TILE * block * 4
        fits = tiles % (beside * own) == 0 and own * block <= 32
        if fits and of_part * beside in (8, 16) and held * stay <= tuning.shared_memory(linear.words.device):
            yield Cut(block, slices, parts, beside, own, 1, 1, True, True, False, stay)


def wide_candidates(linear: TiledLinear, rows_of_x: int) -> Iterator[WideCut]:
    """The same for the kernel for many rows."""
    if not tuning.wide_takes(linear):
        return
    busy, longest = tuning.processors(linear.words.device), -(-linear.columns // tuning.TURN)
    for rows, warps in WIDE_SHARES:
        tiles = linear.rows // (TILE * warps) * -(-rows_of_x // rows)
        near = min(rows_of_x // 2, 128) <= rows < 2 * max(rows_of_x, 16)
        if not near or linear.rows % (TILE * warps):
            continue
        for parts in (1, 2, 3, 4, 6, 8):
            split = parts == 1 or (tiles * parts <= 2.5 * busy and tiles <= tuning.MOST_SHARED)
            if parts <= longest and busy / 2 <= tiles * parts and split:
                yield WideCut(rows, warps, 1, parts)
        if (rows, warps) in ((64, 8), (128, 8), (256, 8)) and tiles > busy / 2:
            yield tuning.simple_wide(rows)
        for stay in (1, 2):
            if (rows, warps, stay) != (256, 8, 2) and tiles > busy / 2:
                yield WideCut(rows, warps, 1, 1, stay)


def copies(linear: TiledLinear) -> list[RunnableLinear]:
    """As many of it as the caches do not hold."""
    number = max(2, -(-BEYOND_CACHE // linear.nbytes))
    others = [dataclasses.replace(linear, words=linear.words.clone()) for _ in range(number - 1)]
    return [RunnableLinear.of(t) for t in (linear, *others)]


def tune(linear: TiledLinear, dtype: torch.dtype = torch.float16) -> None:
    """Find the fastest cuts for every number of rows of x and keep them for this GPU.

    Those for few rows share their slices and parts of K, which lose least over all: what is added to what must not
    depend on how many rows come together.
    """
    every = copies(linear)
    compile_all(every[0], dtype)
    times = {block: few_times(every, block, dtype) for block in tuning.ROWS_OF_X}
    parts = fairest_parts(times)
    best = {}
    for block, found in times.items():
        allowed = {time: cut for cut, time in found.items() if cut.parts == parts}
        if allowed:
            best[block] = allowed[min(allowed)]
    wide = {rows: best_wide(every, rows, dtype) for rows in tuning.WIDE_ROWS}
    tuning.remember(tuning.device_name(linear.words.device), tuning.key_of(linear), best, wide)


def compile_all(linear: RunnableLinear, dtype: torch.dtype) -> None:
    """Compile every candidate, as many at once as there are processors."""
    import triton

    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        triton.AsyncCompileMode(pool, ignore_errors=True),  # who cannot be compiled fails where it is timed
    ):
        for block in tuning.ROWS_OF_X:
            x = _inputs(linear, 1 if block == tuning.ROWS_OF_X[0] else block, dtype)
            for cut in candidates(linear.tiled, block):
                warm(x, linear, cut)
        if has_wide(linear.tiled.words.device):
            for rows in tuning.WIDE_ROWS:
                x = _inputs(linear, rows, dtype)
                for wide in wide_candidates(linear.tiled, rows):
                    warm(x, linear, wide)


def fairest_parts(times: Mapping[int, Mapping[Cut, float]]) -> int:
    """The number of parts, possible for most blocks, whose times over the blocks' best sum to least."""

    def loss(parts: int) -> tuple[int, float]:
        of = [[t for c, t in found.items() if c.parts == parts] for found in times.values()]
        ratios = [min(mine) / min(times[b].values()) for b, mine in zip(times, of, strict=True) if mine]
        return -len(ratios), sum(ratios)

    return min({c.parts for found in times.values() for c in found}, key=loss)


def few_times(every: list[RunnableLinear], block: int, dtype: torch.dtype) -> dict[Cut, float]:
    """Microseconds of every candidate for an entry of ROWS_OF_X; one row for the first."""
    x = _inputs(every[0], 1 if block == tuning.ROWS_OF_X[0] else block, dtype)
    times = {}
    for cut in candidates(every[0].tiled, block):
        time = _time([functools.partial(few_product, x, each, cut=cut) for each in every])
        if time is not None:
            times[cut] = time
    return times


def best_wide(every: list[RunnableLinear], rows: int, dtype: torch.dtype) -> WideCut | None:
    """The fastest cut for so many rows; None where a dense copy for the call's duration is faster."""
    if not has_wide(every[0].tiled.words.device):
        return None
    x = _inputs(every[0], rows, dtype)
    dense = _time([functools.partial(dense_product, x, each.tiled) for each in every])
    times: dict[WideCut | None, float] = {} if dense is None else {None: dense}
    for cut in wide_candidates(every[0].tiled, rows):
        time = _time([functools.partial(wide_product, x, each, cut) for each in every])
        if time is not None:
            times[cut] = time
    return min(times, key=lambda cut: times[cut])


def _inputs(linear: RunnableLinear, rows: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, linear.tiled.in_features, dtype=dtype, device=linear.tiled.words.device)


def _time(calls: Sequence[Callable[[], object]]) -> float | None:
    """Microseconds, or None where a cut takes more than this GPU has."""
    from triton.runtime.errors import OutOfResources

    try:
        return microseconds(calls, replays=4)
    except OutOfResources:
        return None


def microseconds(calls: Sequence[Callable[[], object]], replays: int = 9) -> float:
    """Median time of one call inside a CUDA graph that goes round the list, in microseconds."""
    rounds = -(-LAUNCHES // len(calls))
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in [*calls] * rounds:
            call()
    times: list[float] = []
    for _ in range(replays + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return 1e3 * median(times[1:]) / (rounds * len(calls))
