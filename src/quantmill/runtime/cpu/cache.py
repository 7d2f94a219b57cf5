"""The pages of keys and values, as `attention.py` reads them. Knows no weights and no sequences.

The system gives the memory when a page is first written.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantmill.architectures import Dimensions
from quantmill.kernels.memory import free_memory
from quantmill.runtime.interface import PAGE

SHARE = 4  # the cache takes one part in so many of the free memory where nobody says how many tokens it holds
SEQUENCES = 8  # and no more than so many sequences of full length need


@dataclass(frozen=True, slots=True)
class PagedCache:
    """keys (layers, pages, kv_heads, 4, head_dim, 16), values (layers, pages, kv_heads, 64, head_dim)."""

    keys: NDArray[np.floating]
    values: NDArray[np.floating]

    @property
    def page_stride(self) -> int:
        """Bytes of a layer's keys in a page, and of its values."""
        return int(self.keys.strides[1])

    @property
    def head_stride(self) -> int:
        """Bytes of one head's."""
        return int(self.keys.strides[2])


def paged_cache(sizes: Dimensions, pages: int, half: bool) -> PagedCache:
    """An empty cache, float16 where `half`, else float32."""
    dtype = np.float16 if half else np.float32
    shape = (sizes.layers, pages, sizes.kv_heads)
    return PagedCache(
        keys=np.zeros((*shape, PAGE // 16, sizes.head_dim, 16), dtype),
        values=np.zeros((*shape, PAGE, sizes.head_dim), dtype),
    )


def page_bytes(sizes: Dimensions, half: bool) -> int:
    """Keys and values of 64 positions, all layers."""
    return 2 * sizes.layers * sizes.kv_heads * PAGE * sizes.head_dim * (2 if half else 4)


def page_count(kv_tokens: int | None, context: int, bytes_per_page: int) -> int:
    """Pages of the cache: as asked, else what a part of the free memory holds, at least one page."""
    if kv_tokens is not None:
        return max(1, -(-kv_tokens // PAGE))
    fit = free_memory() // SHARE // bytes_per_page
    return int(max(1, min(fit, SEQUENCES * -(-context // PAGE))))
