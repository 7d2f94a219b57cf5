"""Measure cuts on this GPU and keep the fastest: once for each shape of linear. Knows no file of weights.

Every candidate runs inside a CUDA graph over so many copies of the linear that none is found in the L2 cache.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import torch

from quantmill.kernels.triton import tuning
from quantmill.kernels.triton.linear import RunnableLinear, tiled_product
from quantmill.kernels.triton.packing import TiledLinear
from quantmill.kernels.triton.tuning import Cut

BEYOND_CACHE = 300 << 20  # bytes of copies of one linear: five times the largest L2
LAUNCHES = 24  # at least, in one graph
PARTS = (1, 2, 4, 8, 16)
VOTERS = (16, 64)  # blocks of rows of x that decide the number of parts
# (rows of weights, warps, tiles in shared memory) that won somewhere on an H200, by rows of x
SHARES = {
    16: ((64, 4, 3), (64, 4, 4), (32, 2, 3), (32, 2, 4)),
    32: ((64, 4, 3), (64, 4, 4)),
    64: ((64, 4, 3), (64, 4, 4), (128, 8, 3)),
    128: ((128, 8, 2), (128, 8, 3), (64, 4, 3)),
}


def candidates(linear: TiledLinear, block: int) -> list[Cut]:
    """Cuts worth a measurement."""
    device = linear.words.device
    busy, limit = tuning.processors(device), tuning.shared_memory(device)
    found = {
        tuning.fitted(Cut(rows, parts, warps, stages), block, linear.shape, limit)
        for (rows, warps, stages), parts in itertools.product(SHARES[block], PARTS)
        if linear.tiles >= 2 * parts and busy / 2 <= linear.rows // rows * parts <= 12 * busy
    }
    return sorted(found or {tuning.rule_cut(block, 1)}, key=dataclasses.astuple)


def copies(linear: TiledLinear) -> list[RunnableLinear]:
    """As many of it as the caches do not hold."""
    number = max(2, -(-BEYOND_CACHE // linear.nbytes))
    others = [dataclasses.replace(linear, words=linear.words.clone()) for _ in range(number - 1)]
    return [RunnableLinear.of(t) for t in (linear, *others)]


def tune(
    linear: TiledLinear, dtype: torch.dtype = torch.float16, blocks: Sequence[int] = tuning.ROWS_OF_X
) -> None:
    """Find the fastest cut for every block of rows of x and keep them for this GPU.

    All share one number of parts, the one that loses least for one row and for 64: what is added to what must
    not depend on how many rows come together.
    """
    every = copies(linear)
    times = {block: measured(every, block, dtype) for block in blocks}
    parts = fairest_parts({b: t for b, t in times.items() if b in VOTERS} or times)
    best = {}
    for block, found in times.items():
        allowed = {time: cut for cut, time in found.items() if cut.parts == parts}
        if allowed:
            best[block] = allowed[min(allowed)]
    tuning.remember(tuning.device_name(linear.words.device), tuning.key_of(linear), parts, best)


def fairest_parts(times: Mapping[int, Mapping[Cut, float]]) -> int:
    """The number of parts, possible for every block, whose times over the blocks' best sum to least."""
    possible = set.intersection(*({c.parts for c in found} for found in times.values()))

    def loss(parts: int) -> float:
        return sum(
            min(t for c, t in found.items() if c.parts == parts) / min(found.values())
            for found in times.values()
        )

    return min(possible, key=loss)


def measured(every: list[RunnableLinear], block: int, dtype: torch.dtype) -> dict[Cut, float]:
    """Microseconds of every candidate with `block` rows of x; with one, where `block` is the smallest."""
    from triton.runtime.errors import OutOfResources

    tiled = every[0].tiled
    rows = 1 if block == tuning.ROWS_OF_X[0] else block
    x = torch.randn(rows, tiled.in_features, dtype=dtype, device=tiled.words.device)
    times: dict[Cut, float] = {}
    for cut in candidates(tiled, block):
        calls = [functools.partial(tiled_product, x, each, cut) for each in every]
        try:
            times[cut] = microseconds(calls, replays=4)
        except OutOfResources:  # an estimate of shared memory was off: the cut does not exist here
            continue
    return times


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
