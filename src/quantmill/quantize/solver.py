"""One linear: weights W, Hessian H of its inputs -> codes, scales, zeros, loss. Knows no models, no files.

GPTQ (Frantar et al. 2022, arXiv:2210.17323) in its LDLQ form (Chee et al. 2023, arXiv:2307.13304), with the
factor taken directly from H by a reversed Cholesky decomposition: P H P^T + lam I = V V^T with V upper
triangular. A = V / diag(V) is the feedback and c = diag(V)^2 what an error in a column costs once later
columns have made up for it. Paper letters: W (N, K), H (K, K), N rows out, K columns in.

    damp -> order -> factor -> grids -> round the columns -> refit the scales
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantmill.errors import BadCheckpoint
from quantmill.quantize.columns import round_columns_torch
from quantmill.quantize.grids import ASYM, ASYM_V1, SYM, Grid, fit_torch, shrink_factors
from quantmill.types import ActOrder, CheckpointFormat, IntLinear, QuantConfig

BLOCK = 128  # columns rounded between two GEMMs
MAX_DAMP = 10.0  # above this factor on the mean diagonal a Hessian says nothing
REFIT_GAIN_UP_TO_BITS = 4  # at 8 bits the refit moves scales by less than a float16 step


@dataclass(frozen=True, slots=True)
class Solution:
    """A solved linear and what it took: loss is tr(E H E^T) / tr(W H W^T)."""

    linear: IntLinear
    loss: float
    damp_percent: float
    fallback: str | None


@dataclass(frozen=True, slots=True)
class Factor:
    """The damped Hessian in solving order."""

    order: Tensor  # (K,) int64: column order[i] is solved i-th
    damped: Tensor  # (K, K) float32, original order
    feedback: Tensor  # A (K, K) float32, unit upper triangular, solving order
    cost: Tensor  # c (K,) float32, solving order
    damp_percent: float


def solve(W: Tensor, H: Tensor, config: QuantConfig) -> Solution:
    """Quantise one linear: `solve_group` of one."""
    return solve_group([W], H, config)[0]


def solve_group(weights: Sequence[Tensor], H: Tensor, config: QuantConfig) -> list[Solution]:
    """Quantise linears that read the same inputs, as one: rows do not know of each other.

    weights: W (N_i, K) float32 each; H (K, K) float32: the mean of x x^T over the calibration tokens.
    Raises BadCheckpoint when any holds NaN or infinity. A Hessian that cannot be factored even with heavy
    damping is replaced by its diagonal, and the result says so.
    """
    W = torch.cat(list(weights))
    _refuse_non_finite(W, H)
    factor, fallback = factorise(H, config)
    linear = _round(W, factor, config)
    if config.bits <= REFIT_GAIN_UP_TO_BITS:
        linear = refit(W, factor.damped, linear)
    parts = _split_rows(linear, [len(w) for w in weights])
    losses = [relative_loss(w, dequantize(part), H) for w, part in zip(weights, parts, strict=True)]
    return [Solution(p, loss, factor.damp_percent, fallback) for p, loss in zip(parts, losses, strict=True)]


def _split_rows(linear: IntLinear, rows: list[int]) -> list[IntLinear]:
    pieces = zip(*(torch.split(t, rows) for t in (linear.codes, linear.scales, linear.zeros)), strict=True)
    return [IntLinear(codes, scales, zeros, linear.g_idx.clone()) for codes, scales, zeros in pieces]


def dequantize(linear: IntLinear) -> Tensor:
    """W (N, K) float32 that the stored integers and float16 scales stand for."""
    g = linear.g_idx.long()
    centred = linear.codes.float() - linear.zeros.float()[:, g]
    return linear.scales.float()[:, g] * centred


def relative_loss(W: Tensor, Q: Tensor, H: Tensor) -> float:
    """tr((W-Q) H (W-Q)^T) / tr(W H W^T): the share of the output's energy that is error."""
    E = W - Q
    wrong, whole = ((E @ H) * E).sum(dtype=torch.float64), ((W @ H) * W).sum(dtype=torch.float64)
    return float(wrong / whole) if whole > 0 else 0.0


def _refuse_non_finite(W: Tensor, H: Tensor) -> None:
    if not bool(torch.isfinite(W).all()):
        raise BadCheckpoint("the weights hold NaN or infinity: fetch the source model again")
    if not bool(torch.isfinite(H).all()):
        raise BadCheckpoint("the activations overflow: load the source in bfloat16 or float32")


def factorise(H: Tensor, config: QuantConfig) -> tuple[Factor, str | None]:
    """Damp, order and factor H; more damping, three times at a go, until it is positive definite."""
    mean = float(H.diagonal().double().mean())
    damp, order = config.damp_percent, solving_order(H.diagonal(), config)
    while damp <= MAX_DAMP and mean > 0:
        damped = H.double()
        damped.diagonal().add_(damp * mean)
        V = reversed_cholesky(damped[order][:, order])
        if V is not None:
            raised = None if damp == config.damp_percent else f"needed {damp:g} damping"
            return _as_factor(V, damped, order, damp), raised
        damp *= 3
    lonely = torch.diag(H.diagonal().double().clamp_min(mean if mean > 0 else 1.0))
    V = lonely[order][:, order].sqrt()
    return _as_factor(V, lonely, order, damp), "rounded to nearest: the Hessian has no Cholesky factor"


def _as_factor(V: Tensor, damped: Tensor, order: Tensor, damp: float) -> Factor:
    pivots = V.diagonal()
    return Factor(order, damped.float(), (V / pivots).float(), pivots.square().float(), damp)


def reversed_cholesky(H: Tensor) -> Tensor | None:
    """Upper triangular V with H = V V^T, float64; None if H is not positive definite.

    V^-1 is the factor that GPTQ obtains by Cholesky, inverse, Cholesky; this way it takes one decomposition
    and no inverse.
    """
    L, info = torch.linalg.cholesky_ex(H.flip(0, 1))
    return None if int(info) else L.flip(0, 1)


def solving_order(diagonal: Tensor, config: QuantConfig) -> Tensor:
    """Most active columns first, or as they come; (K,) int64."""
    if config.act_order is ActOrder.NONE:
        return torch.arange(len(diagonal), device=diagonal.device)
    return torch.argsort(diagonal, descending=True, stable=True)


def group_index(order: Tensor, config: QuantConfig) -> Tensor:
    """Group of every column, in original order, (K,) int64: consecutive, or following the act order."""
    K = len(order)
    consecutive = torch.arange(K, device=order.device) // config.effective_group(K)
    if config.act_order is not ActOrder.GROUPED:
        return consecutive
    g_idx = torch.empty_like(consecutive)
    g_idx[order] = consecutive
    return g_idx


def grid_of(config: QuantConfig) -> Grid:
    """The row of the grid table that a configuration asks for."""
    if config.sym:
        return SYM
    return ASYM_V1 if config.zero_format is CheckpointFormat.GPTQ else ASYM


def _round(W: Tensor, factor: Factor, config: QuantConfig) -> IntLinear:
    """Grids and codes. Static order fixes all grids first; the others fit a group when the loop reaches it."""
    g_idx = group_index(factor.order, config)
    if config.act_order is ActOrder.STATIC:
        cost = torch.empty_like(factor.cost)
        cost[factor.order] = factor.cost
        scales, zeros = fit_grids(W, cost, config)
        codes = _round_static(W, factor, config, g_idx, scales, zeros)
    else:
        codes, scales, zeros = _round_dynamic(W, factor, config)
    return IntLinear(codes, scales.half(), zeros.to(torch.uint8), g_idx.int())


def fit_grids(W: Tensor, cost: Tensor, config: QuantConfig) -> tuple[Tensor, Tensor]:
    """Scales and zeros (N, groups) float32 of consecutive groups of W (N, K), weighted by cost (K,)."""
    size, grid, factors = config.effective_group(W.shape[1]), grid_of(config), shrink_factors(config.bits)
    if W.device.type == "cpu":
        from quantmill.quantize.grids_numba import fit_groups

        return fit_groups(W, cost, size, config.max_code, grid, factors)
    pairs = [
        fit_torch(w, c, config.max_code, grid, factors)
        for w, c in zip(torch.split(W, size, 1), torch.split(cost, size), strict=True)
    ]
    return torch.stack([s for s, _ in pairs], 1), torch.stack([z for _, z in pairs], 1)


Rounder = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]


def _rounder(device: torch.device) -> Rounder:
    if device.type == "cpu":
        from quantmill.quantize.columns_numba import round_columns_numba

        return round_columns_numba
    return round_columns_torch


def _round_static(
    W: Tensor, factor: Factor, config: QuantConfig, g_idx: Tensor, scales: Tensor, zeros: Tensor
) -> Tensor:
    """Codes (N, K) uint8 in original order, all grids known."""
    order, A, rounder = factor.order, factor.feedback, _rounder(W.device)
    T, group = W[:, order], g_idx[order]
    E, codes = torch.zeros_like(T), torch.empty(T.shape, dtype=torch.uint8, device=T.device)
    for i in range(0, T.shape[1], BLOCK):
        now = slice(i, min(i + BLOCK, T.shape[1]))
        carried, s, z = E[:, :i] @ A[:i, now], scales[:, group[now]], zeros[:, group[now]]
        codes[:, now], E[:, now] = rounder(T[:, now], carried, A[now, now], s, z, config.max_code)
    return _unpermute(codes, order)


def _round_dynamic(W: Tensor, factor: Factor, config: QuantConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Codes in original order, and grids, each fitted on its group as compensated for all earlier errors."""
    order, A, rounder = factor.order, factor.feedback, _rounder(W.device)
    T, size = W[:, order], config.effective_group(W.shape[1])
    E, codes = torch.zeros_like(T), torch.empty(T.shape, dtype=torch.uint8, device=T.device)
    grids = []
    for i in range(0, T.shape[1], size):
        now = slice(i, min(i + size, T.shape[1]))
        carried = E[:, :i] @ A[:i, now]
        compensated = T[:, now] + _spread(carried, A[now, now])
        s, z = fit_grids(compensated, factor.cost[now].contiguous(), config)
        grids.append((s, z))
        wide = s.expand(-1, now.stop - i), z.expand(-1, now.stop - i)
        codes[:, now], E[:, now] = _round_group(
            T[:, now], carried, A[now, now], *wide, config.max_code, rounder
        )
    scales, zeros = (torch.cat(parts, 1) for parts in zip(*grids, strict=True))
    return _unpermute(codes, order), scales, zeros


def _round_group(
    T: Tensor, carried: Tensor, A: Tensor, scale: Tensor, zero: Tensor, max_code: int, rounder: Rounder
) -> tuple[Tensor, Tensor]:
    """A group of any width, BLOCK columns at a time, so that wide groups run as GEMMs, too."""
    E, codes = torch.zeros_like(T), torch.empty(T.shape, dtype=torch.uint8, device=T.device)
    for i in range(0, T.shape[1], BLOCK):
        now = slice(i, min(i + BLOCK, T.shape[1]))
        fed = carried[:, now] + E[:, :i] @ A[:i, now]
        codes[:, now], E[:, now] = rounder(T[:, now], fed, A[now, now], scale[:, now], zero[:, now], max_code)
    return codes, E


def _spread(carried: Tensor, A: Tensor) -> Tensor:
    """Feedback on a group as GPTQ holds it at its start, X A = carried, from what LDLQ adds by column."""
    spread: Tensor = torch.linalg.solve_triangular(A, carried, upper=True, left=False, unitriangular=True)
    return spread


def _unpermute(codes: Tensor, order: Tensor) -> Tensor:
    original = torch.empty_like(codes)
    original[:, order] = codes
    return original


def refit(W: Tensor, H: Tensor, linear: IntLinear, ridge: float = 1e-3) -> IntLinear:
    """Scales that minimise the layer's loss with the codes held fixed; rows that do not gain keep theirs.

    Per row, with B (K, groups) the centred codes spread over the columns' groups: M = B^T H B, r = B^T H w,
    s = (M + rho I)^-1 (r + rho s_old), rounded to float16. The loss is w^T H w - 2 s^T r + s^T M s.
    """
    g, old = linear.g_idx.long(), linear.scales.float()
    by_group = torch.argsort(g, stable=True)
    centred = (linear.codes.float() - linear.zeros.float()[:, g])[:, by_group]
    ordered = H[by_group][:, by_group]
    right = (W @ H)[:, by_group] * centred
    spread = nn.functional.one_hot(g[by_group], old.shape[1]).float()
    scales = torch.empty_like(old)
    step = max(1, (1 << 27) // (8 * old.shape[1] ** 2))
    for rows in torch.split(torch.arange(len(W), device=W.device), step):
        M = _group_products(ordered, centred[rows], spread)
        scales[rows] = _best_scales(M, (right[rows] @ spread).double(), old[rows], ridge)
    return IntLinear(linear.codes, scales.half(), linear.zeros, linear.g_idx)


def _group_products(H: Tensor, centred: Tensor, spread: Tensor) -> Tensor:
    """M = B^T H B of every row, (n, groups, groups) float64; columns sorted by group, spread (K, groups)."""
    sizes = spread.sum(0).long().tolist()
    M = torch.zeros(len(centred), len(sizes), len(sizes), dtype=torch.float64, device=H.device)
    start = 0
    for i, size in enumerate(sizes):
        now, on = slice(start, start + size), slice(start, None)  # M is symmetric: from the diagonal on
        M[:, i, i:] = ((centred[:, now] @ H[now, on]) * centred[:, on]) @ spread[on, i:]
        start += size
    return M + M.triu(1).mT


def _best_scales(M: Tensor, r: Tensor, old: Tensor, ridge: float) -> Tensor:
    """Refitted scales (n, groups), float32 holding float16 values, or the old ones where they are not worse."""
    rho = ridge * M.diagonal(dim1=1, dim2=2).mean(1, keepdim=True) + 1e-30
    damped = M + torch.diag_embed(rho.expand(-1, M.shape[1]))
    stored = torch.linalg.solve(damped, r + rho * old).half().float()
    usable = torch.isfinite(stored) & (stored != 0) & (stored.sign() == old.sign())
    new = torch.where(usable, stored, old)
    gain = _quadratic(M, r, old) - _quadratic(M, r, new)
    return torch.where(gain[:, None] > 0, new, old)


def _quadratic(M: Tensor, r: Tensor, s: Tensor) -> Tensor:
    """s^T M s - 2 s^T r for every row, (n,) float64."""
    wide = s.double()
    return torch.einsum("ni,nij,nj->n", wide, M, wide) - 2 * (wide * r).sum(1)
