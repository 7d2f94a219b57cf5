"""How many rows a decode step takes: as many as have the same bits, or, for speed, as many as there are.

More rows than that become several steps, so that a row's bits do not depend on who else is in the pass.
"""

from __future__ import annotations

import functools
import os

BATCHES = "QUANTMILL_BATCHES"  # "fast": many rows go to kernels for many, and have other bits than few
FAST = "fast"
SIZES = (64, 32)  # rows of a fused step: straight from the codes, each with the bits that it has alone


@functools.cache
def fast_batches() -> bool:
    """Whether a row's bits may depend on the batch, as $QUANTMILL_BATCHES says."""
    return os.environ.get(BATCHES, "") == FAST


def step_sizes() -> tuple[int, ...]:
    """Rows of a fused step, the largest that is right serves. Where batches are fast, more take another way."""
    return SIZES[1:] if fast_batches() else SIZES
