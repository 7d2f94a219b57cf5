"""How fast this GPU reads its memory: the ceiling of decoding."""

from __future__ import annotations

import functools
from collections.abc import Callable
from statistics import median

import torch

SHAPES = ((8192, 2, 8), (8192, 4, 8), (4096, 4, 4))  # words at once, rounds, warps: the best counts


def read_rate(nbytes: int = 1 << 31) -> float:
    """Bytes a second of reading `nbytes` once, in one launch."""
    from quantmill.runtime.gpu.kernels.reading import read_kernel

    words = torch.randint(-9, 9, (nbytes // 4,), dtype=torch.int32, device="cuda")
    x, y = torch.zeros(2, 4096, dtype=torch.int32, device="cuda")

    def read(block: int, rounds: int, warps: int) -> None:
        grid = (-(-len(words) // (block * rounds)),)
        read_kernel[grid](words, x, y, len(words), block, rounds, False, num_warps=warps)

    times = [graph_ms(functools.partial(read, *shape)) for shape in SHAPES]
    return nbytes / min(times) * 1e3


def graph_ms(body: Callable[[], object], replays: int = 12) -> float:
    """Median milliseconds of what `body` launches, in one CUDA graph."""
    body()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    return median_ms(graph.replay, replays)


def median_ms(call: Callable[[], object], times: int) -> float:
    """Median milliseconds of a call by the GPU's clock, two rounds of warming up apart."""
    found: list[float] = []
    for _ in range(times + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        call()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end))
    return median(found[2:])
