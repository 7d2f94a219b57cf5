"""The kernels between the linears: embedding, residual, RMSNorm, gather into a linear's order, SiLU."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def norm_kernel(
    residual,  # (rows, K) float32: read (unless EMBED) and, where there is something to add, written
    added,  # EMBED: (vocab, K) the embedding; HAS_ADDED: (rows, K); else not read
    tokens,  # (rows,) int32; not read unless EMBED
    gain,  # (K,) float32
    order,  # (places,) int32: the input of each place, below 0: none; not read unless HAS_ORDER
    out,  # (rows, K or places) fp16 or bf16
    K,
    places,
    times,  # what is added is multiplied by it
    EPSILON: tl.constexpr,
    EMBED: tl.constexpr,
    HAS_ADDED: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    BLOCK: tl.constexpr,  # a power of two, at least K
    BLOCK_OUT: tl.constexpr,  # the same of places
    PDL: tl.constexpr,
):
    """One program: one row's residual and its norm in the order in which the next linear reads it."""
    if PDL:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    here = k < K
    weight = tl.load(gain + k, mask=here, other=0.0)  # depends on no kernel before this one
    if PDL:
        gdc_wait()
    if EMBED:
        token = tl.load(tokens + row).to(tl.int64)
        x = tl.load(added + token * K + k, mask=here, other=0.0).to(tl.float32)
        tl.store(residual + row * K + k, x, mask=here)
    else:
        x = tl.load(residual + row * K + k, mask=here, other=0.0)
        if HAS_ADDED:
            x += tl.load(added + row * K + k, mask=here, other=0.0).to(tl.float32) * times
            tl.store(residual + row * K + k, x, mask=here)
    scale = tl.rsqrt(tl.sum(x * x, 0) / K + EPSILON)
    if HAS_ORDER:
        tl.debug_barrier()  # the residual is read again, by other threads of this program
        place = tl.arange(0, BLOCK_OUT)
        inside = place < places
        source = tl.load(order + place, mask=inside, other=-1)
        x = tl.load(residual + row * K + source, mask=source >= 0, other=0.0)
        x = x * scale * tl.load(gain + source, mask=source >= 0, other=0.0)
        tl.store(out + row * places + place, x.to(out.dtype.element_ty), mask=inside)
    else:
        x = x * scale * weight
        tl.store(out + row * K + k, x.to(out.dtype.element_ty), mask=here)


@triton.jit
def silu_kernel(
    gate_up,  # (rows, 2 N) any float: SPAN gates, their ups, the next gates ...
    out,  # (rows, N) fp16 or bf16, rows `stride` apart
    N,
    stride,
    scale,  # a power of two that keeps products within fp16
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """silu(gate) * up * scale for BLOCK places of one row."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = n < N
    at = gate_up + row * 2 * N + n // SPAN * (2 * SPAN) + n % SPAN
    gate = tl.load(at, mask=here, other=0.0).to(tl.float32)
    up = tl.load(at + SPAN, mask=here, other=0.0).to(tl.float32)
    value = gate / (1.0 + tl.exp(tl.minimum(-gate, 80.0))) * up * scale
    tl.store(out + row * stride + n, value.to(out.dtype.element_ty), mask=here)


@triton.jit
def start_kernel(
    residual,  # (rows, K) float32: written
    embedding,  # (vocab, K)
    tokens,  # (rows,) int32
    gain,  # (K,) float32
    position,  # (K,) int32: where an input goes in `after`; not read unless HAS_POSITION
    after,  # (rows, places) fp16 or bf16
    squares,  # (rows, K / 16) float32
    K,
    places,
    scale,
    HAS_POSITION: tl.constexpr,
    BLOCK: tl.constexpr,  # a power of two, at least K
):
    """One program: one row's residual, what the first linear reads of it, not yet normed, and its squares."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    here = k < K
    token = tl.load(tokens + row).to(tl.int64)
    x = tl.load(embedding + token * K + k, mask=here, other=0.0).to(tl.float32)
    tl.store(residual + row * K + k, x, mask=here)
    sums = tl.sum(tl.reshape(x * x, (BLOCK // 16, 16)), 1)
    i = tl.arange(0, BLOCK // 16)
    tl.store(squares + row * (K // 16) + i, sums, mask=i < K // 16)
    place = k
    if HAS_POSITION:
        place = tl.load(position + k, mask=here, other=0)
    value = x * scale * tl.load(gain + k, mask=here, other=0.0)
    tl.store(after + row * places + place, value.to(after.dtype.element_ty), mask=here)
