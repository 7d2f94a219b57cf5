"""What this machine's memory gives: measured once for each kind of device, when its first model is there.

Not while a model works: the measurement uses the same threads, or the same GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

Measure = Callable[[], float]
log = logging.getLogger("quantmill.serve")
_rates: dict[bool, float] = {}  # by whether it is a GPU's


def on_gpu(runtime: str) -> bool:
    """Whether a runtime of this name (`facts.name`) is on a GPU."""
    return runtime.startswith("cuda")


def measure(
    runtime: str, threads: int | None = None, beside: Callable[[Measure], float] = lambda read: read()
) -> None:
    """Read a block that no cache holds. Blocking: a fraction of a second on an idle machine.

    beside: runs a function where the model is, so that no other process opens its GPU.
    """
    gpu = on_gpu(runtime)
    if gpu in _rates:
        return
    try:
        _rates[gpu] = beside(_gpu) if gpu else _cpu(threads)
    except (RuntimeError, MemoryError) as error:  # no room for the block, say: a figure less in /metrics
        log.warning("the memory bandwidth could not be measured", extra={"error": str(error)})


def measured(runtime: str) -> float | None:
    """Bytes per second; None before `measure`."""
    return _rates.get(on_gpu(runtime))


def _cpu(threads: int | None) -> float:
    from quantmill.kernels.cpu.bandwidth import streaming_read
    from quantmill.kernels.cpu.pool import default_threads, shared_pool

    return streaming_read(shared_pool(threads or default_threads()), 1 << 27, 3)


def _gpu() -> float:
    from quantmill.runtime.gpu.reading import read_rate

    return read_rate(1 << 28)
