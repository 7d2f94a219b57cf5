"""What this machine's memory gives: measured once, in a blink, when somebody first asks."""

from __future__ import annotations

import time
from functools import cache

BLOCK = 1 << 26  # bytes: larger than most caches
TRIES = 3


@cache
def memory_bandwidth(gpu: bool) -> float:
    """Bytes per second that can be read and written: the best of a few copies, counted both ways."""
    return _gpu() if gpu else _cpu()


def _cpu() -> float:
    import numpy as np

    source, target = np.ones(BLOCK, np.uint8), np.zeros(BLOCK, np.uint8)
    best = 0.0
    for _ in range(TRIES):
        began = time.perf_counter()
        np.copyto(target, source)
        best = max(best, 2 * BLOCK / (time.perf_counter() - began))
    return best


def _gpu() -> float:
    import torch

    source = torch.ones(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(TRIES):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        best = max(best, 2 * source.numel() / (begin.elapsed_time(end) / 1e3))
    return best
