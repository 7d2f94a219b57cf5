"""A dense linear times few rows: the output head, and linears that were left unquantised. fp32 sums."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantmill.runtime.gpu.kernels.rotary import prefetch_rows


@triton.jit(do_not_specialize=["M"])
def dense_kernel(
    x,  # (M, K) fp16 or bf16
    weight,  # (N, K) as x
    bias,  # (N,) float32; not read unless HAS_BIAS
    squares,  # (M, COUNT) float32: sums of squares that x's norm is made from; not read unless COUNT
    y,  # (M, N) float32 or as x
    M,
    N,
    K,
    unscale,  # COUNT: results are times this and x's norm
    EPSILON: tl.constexpr,
    COUNT: tl.constexpr,
    COUNTS: tl.constexpr,  # a power of two, at least COUNT
    HAS_BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: BN outputs of BM rows. What is added to what does not depend on M."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)  # first, so that programs side by side share their weights
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    i = tl.arange(0, BK)
    if PDL:
        gdc_launch_dependents()
        prefetch_rows(weight, tl.minimum(n, N - 1), K)
        gdc_wait()
    rows, outputs = (m < M)[None, :], (n < N)[:, None]
    total = tl.zeros((BN, BM), tl.float32)
    for first in tl.range(0, K, BK):
        k = first + i
        w = tl.load(
            weight + n.to(tl.int64)[:, None] * K + k[None, :], mask=outputs & (k < K)[None, :], other=0.0,
            eviction_policy="evict_first",
        )  # fmt: skip
        inputs = tl.load(x + m[None, :] * K + k[:, None], mask=rows & (k < K)[:, None], other=0.0)
        total = tl.dot(w, inputs, total)
    if COUNT > 0:
        i = tl.arange(0, COUNTS)
        seen = (m < M)[:, None] & (i < COUNT)[None, :]
        sums = tl.sum(tl.load(squares + m[:, None] * COUNT + i[None, :], mask=seen, other=0.0), 1)
        total *= (tl.rsqrt(sums / K + EPSILON) * unscale)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0)[:, None]
    at = y + m.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(at, total.to(y.dtype.element_ty), mask=rows & outputs)
