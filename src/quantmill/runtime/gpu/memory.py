"""The paged cache's size and tensors. Knows no layer's arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quantmill.errors import BadRequest
from quantmill.runtime.cpu.settings import Settings
from quantmill.runtime.gpu.tensors import LayerCache
from quantmill.runtime.interface import PAGE

DTYPES = (torch.float16, torch.bfloat16)
KV_DTYPES = ("fp16", "fp8")
CONTEXTS = 4  # of the longest length, where nothing else is asked for
SHARE = 0.8  # of the free memory that the cache may take
FP8_FROM = (8, 9)  # compute capability


def pages_for(
    settings: Settings,
    context: int,
    kv_tokens: int | None,
    kv_dtype: str,
    dtype: torch.dtype,
    device: torch.device,
) -> int:
    """Pages of the cache. Raises BadRequest where they do not fit, or eight bits are not to be had here."""
    if kv_dtype not in KV_DTYPES:
        raise BadRequest(f"the cache's type is {kv_dtype!r}; use {' or '.join(KV_DTYPES)}")
    fits = _fitting(settings, kv_dtype, dtype, device)
    if kv_tokens is None:
        wanted = CONTEXTS * -(-context // PAGE)
        return wanted if fits is None else max(1, min(wanted, fits))
    pages = -(-kv_tokens // PAGE)
    if pages < 1 or (fits is not None and pages > fits):
        raise BadRequest(
            f"a cache for {kv_tokens} tokens was asked for; {(fits or 0) * PAGE} fit: ask for fewer"
        )
    return pages


def page_bytes(settings: Settings, kv_dtype: str) -> int:
    """Keys and values of PAGE positions, all layers."""
    sizes = settings.sizes
    one = sizes.head_dim + 2 if kv_dtype == "fp8" else 2 * sizes.head_dim
    return 2 * PAGE * sizes.kv_heads * one * sizes.layers


def _fitting(settings: Settings, kv_dtype: str, dtype: torch.dtype, device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    if kv_dtype == "fp8" and torch.cuda.get_device_capability(device) < FP8_FROM:
        raise BadRequest("an fp8 cache needs compute capability 8.9: use --kv-dtype fp16")
    free = torch.cuda.mem_get_info(device)[0]
    return int(free * SHARE) // page_bytes(settings, kv_dtype)


def make_caches(
    settings: Settings, pages: int, kv_dtype: str, dtype: torch.dtype, device: torch.device
) -> tuple[LayerCache, ...]:
    """Zeros for every layer, in one piece of memory: places that nobody has written must be finite."""
    sizes = settings.sizes
    shape = sizes.layers, 2, pages, sizes.kv_heads, PAGE, sizes.head_dim
    fp8 = kv_dtype == "fp8"
    vectors = torch.zeros(shape, dtype=torch.uint8 if fp8 else dtype, device=device)
    scales = torch.zeros(shape[:-1], dtype=torch.float16, device=device) if fp8 else None
    return tuple(
        LayerCache(keys, values, *((None, None) if scales is None else scales[i]))
        for i, (keys, values) in enumerate(vectors)
    )


def cache_bytes(caches: Sequence[LayerCache]) -> int:
    """What the tensors take."""
    tensors = [t for c in caches for t in (c.keys, c.values, c.key_scales, c.value_scales) if t is not None]
    return sum(t.numel() * t.element_size() for t in tensors)
