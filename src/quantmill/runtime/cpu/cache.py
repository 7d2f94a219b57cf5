"""The keys and values of what a decoder has read, as `attention.py` reads them. Knows no weights.

A layer with a window keeps a ring that the window and one block of new positions fit; others keep every
position. Memory is taken from the system as positions come.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantmill.runtime.cpu.attention import CHUNK
from quantmill.runtime.cpu.settings import Settings


@dataclass(frozen=True, slots=True)
class LayerCache:
    """keys (kv_heads, blocks, head_dim, 16), values (kv_heads, capacity, head_dim), float32 or float16."""

    keys: NDArray[np.floating]
    values: NDArray[np.floating]

    @property
    def capacity(self) -> int:
        """Positions."""
        return int(self.values.shape[1])

    @property
    def head_stride(self) -> int:
        """Bytes of one head."""
        return int(self.values.strides[0])


def layer_caches(settings: Settings, positions: int, block: int, half: bool) -> list[LayerCache]:
    """One cache per layer for `positions` in all, `block` of them added at once."""
    return [_layer(settings, positions, window, block, half) for window in settings.windows]


def _layer(settings: Settings, positions: int, window: int, block: int, half: bool) -> LayerCache:
    sizes, dtype = settings.sizes, np.float16 if half else np.float32
    needed = min(positions, window + block) if window else positions
    capacity = -(-needed // CHUNK) * CHUNK
    return LayerCache(
        keys=np.zeros((sizes.kv_heads, capacity // 16, sizes.head_dim, 16), dtype),
        values=np.zeros((sizes.kv_heads, capacity, sizes.head_dim), dtype),
    )
