"""One linear: weights W, Hessian H of its inputs -> codes, scales, zeros, loss. Knows no models, no files.

GPTQ (Frantar et al. 2022, arXiv:2210.17323) in its LDLQ form (Chee et al. 2023, arXiv:2307.13304), with the
factor taken directly from H by a reversed Cholesky decomposition: P H P^T + lam I = V V^T with V upper
triangular. A = V / diag(V) is the feedback and c = diag(V)^2 what an error in a column costs once later
columns have made up for it. Paper letters: W (N, K), H (K, K), N rows out, K columns in.

    damp -> order -> factor -> grids -> round the columns -> refit the scales
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantmill.errors import BadCheckpoint
from quantmill.quantize.arithmetic import precise_product
from quantmill.quantize.columns import fed_back, in_order, in_place
from quantmill.quantize.grids import ASYM, ASYM_V1, SYM, Grid, shrink_factors
from quantmill.quantize.machines import RoundColumns, machine_of
from quantmill.quantize.refit import refit
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
    choice: str | None = None  # what preset best chose for this module


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
    refuse_non_finite(W, H)
    linear, damp_percent, fallback = solve_rows(W, H, config)
    parts = split_rows(linear, [len(w) for w in weights])
    losses = [relative_loss(w, dequantize(part), H) for w, part in zip(weights, parts, strict=True)]
    return [Solution(p, loss, damp_percent, fallback) for p, loss in zip(parts, losses, strict=True)]


def solve_rows(W: Tensor, H: Tensor, config: QuantConfig) -> tuple[IntLinear, float, str | None]:
    """Any rows of a group: the solved linear, the damping it took and why it is not what was asked for."""
    factor, fallback = factorise(H, config)
    linear = round_to_grid(W, factor, config)
    if config.bits <= REFIT_GAIN_UP_TO_BITS:
        linear = refit(W, factor.damped, linear)
    return linear, factor.damp_percent, fallback


def split_rows(linear: IntLinear, rows: list[int]) -> list[IntLinear]:
    pieces = zip(*(torch.split(t, rows) for t in (linear.codes, linear.scales, linear.zeros)), strict=True)
    return [IntLinear(codes, scales, zeros, linear.g_idx.clone()) for codes, scales, zeros in pieces]


def dequantize(linear: IntLinear) -> Tensor:
    """W (N, K) float32 that the stored integers and float16 scales stand for."""
    g = linear.g_idx.long()
    centred = linear.codes.float() - linear.zeros.float()[:, g]
    return linear.scales.float()[:, g] * centred


def relative_loss(W: Tensor, Q: Tensor, H: Tensor) -> float:
    """tr((W-Q) H (W-Q)^T) / tr(W H W^T): the share of the output's energy that is error."""
    wrong, whole = energies(W, Q, H).sum(0).tolist()
    return wrong / whole if whole > 0 else 0.0


def energies(W: Tensor, Q: Tensor, H: Tensor) -> Tensor:
    """Per row the output's energy that is error, and all of it: diag((W-Q) H (W-Q)^T), diag(W H W^T); (N, 2)."""
    rows = (W - Q, W)
    return torch.stack([(precise_product(x, H) * x).sum(1, dtype=torch.float64) for x in rows], 1)


def refuse_non_finite(W: Tensor, H: Tensor) -> None:
    if not bool(torch.isfinite(W).all()):
        raise BadCheckpoint("the weights hold NaN or infinity: fetch the source model again")
    if not bool(torch.isfinite(H).all()):
        raise BadCheckpoint("the activations overflow: load the source in bfloat16 or float32")


def factorise(H: Tensor, config: QuantConfig, order: Tensor | None = None) -> tuple[Factor, str | None]:
    """Damp, order and factor H; more damping, three times at a go, until it is positive definite."""
    mean = float(H.diagonal().double().mean())
    damp = config.damp_percent
    order = solving_order(H.diagonal(), config) if order is None else order
    while damp <= MAX_DAMP and mean > 0:
        diagonal = H.diagonal().double() + damp * mean
        L = reversed_cholesky(H, diagonal, order)
        if L is not None:
            raised = None if damp == config.damp_percent else f"needed {damp:g} damping"
            return _as_factor(L, H, diagonal, order, damp), raised
        damp *= 3
    lonely = H.diagonal().double().clamp_min(mean if mean > 0 else 1.0)
    nothing = torch.zeros_like(H)
    L = torch.diag(lonely[order.flip(0)].sqrt())
    why = "rounded to nearest: the Hessian has no Cholesky factor"
    return _as_factor(L, nothing, lonely, order, damp), why


def reversed_cholesky(H: Tensor, diagonal: Tensor, order: Tensor) -> Tensor | None:
    """Lower triangular L, float64, of H with another diagonal and its columns in reversed order; None without one.

    Reversed in both directions it is the upper triangular V with H[order, order] = V V^T, whose inverse is
    the factor that GPTQ obtains by Cholesky, inverse, Cholesky: this way it takes one and no inverse.
    """
    backwards = order.flip(0)
    wide = H[backwards][:, backwards].double()
    wide.diagonal().copy_(diagonal[backwards])
    L, info = torch.linalg.cholesky_ex(wide)
    return None if int(info) else L


def _as_factor(L: Tensor, H: Tensor, diagonal: Tensor, order: Tensor, damp: float) -> Factor:
    """The factor of H with another diagonal; takes L over. One float64 K x K at a time, no more."""
    pivots = L.diagonal().clone()
    feedback = L.div_(pivots).float().flip(0, 1)
    damped = H.clone()
    damped.diagonal().copy_(diagonal)
    return Factor(order, damped, feedback, pivots.square().float().flip(0), damp)


def solving_order(diagonal: Tensor, config: QuantConfig) -> Tensor:
    """Most active columns first, or as they come; (K,) int64."""
    if config.act_order is ActOrder.NONE:
        return torch.arange(len(diagonal), device=diagonal.device)
    return torch.argsort(diagonal, descending=True, stable=True)


def group_aware_order(diagonal: Tensor, config: QuantConfig) -> Tensor:
    """Groups by their most active column, inside a group the most active columns first; (K,) int64.

    Groups stay whole, so that each grid can be fitted on what earlier groups' errors made of it (GAR,
    Gafni et al. 2025, arXiv:2505.14638). Groups must divide the columns.
    """
    size = config.effective_group(len(diagonal))
    in_groups = diagonal.view(-1, size)
    groups = torch.argsort(in_groups.amax(1), descending=True, stable=True)
    inside = torch.argsort(in_groups, dim=1, descending=True, stable=True)
    return (groups[:, None] * size + inside[groups]).flatten()


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


def round_group_aware(W: Tensor, factor: Factor, config: QuantConfig) -> IntLinear:
    """Grids and codes for a factor in `group_aware_order`: consecutive groups, each fitted when reached."""
    codes, scales, zeros = _round_dynamic(W, factor, config)
    size = config.effective_group(W.shape[1])
    place = torch.argsort(factor.order[::size] // size)
    g_idx = torch.arange(W.shape[1], device=W.device) // size
    return IntLinear(codes, scales[:, place].half(), zeros[:, place].to(torch.uint8), g_idx.int())


def round_to_grid(W: Tensor, factor: Factor, config: QuantConfig) -> IntLinear:
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
    return machine_of(W.device).fit_groups(W, cost, size, config.max_code, grid, factors)


def _round_static(
    W: Tensor, factor: Factor, config: QuantConfig, g_idx: Tensor, scales: Tensor, zeros: Tensor
) -> Tensor:
    """Codes (N, K) uint8 in original order, all grids known."""
    order, A, rounder = factor.order, factor.feedback, machine_of(W.device).round_columns
    T, group = in_order(W, order), g_idx[order]
    E, codes = torch.zeros_like(T), torch.empty_like(T, dtype=torch.uint8)
    for i in range(0, T.shape[1], BLOCK):
        now = slice(i, min(i + BLOCK, T.shape[1]))
        carried = fed_back(E[:, :i], A[:i, now])
        s, z = in_order(scales, group[now]), in_order(zeros, group[now])
        codes[:, now], E[:, now] = rounder(T[:, now], carried, A[now, now], s, z, config.max_code)
    return in_place(codes, order)


def _round_dynamic(W: Tensor, factor: Factor, config: QuantConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Codes in original order, and grids, each fitted on its group as compensated for all earlier errors."""
    order, A, rounder = factor.order, factor.feedback, machine_of(W.device).round_columns
    T, size = in_order(W, order), config.effective_group(W.shape[1])
    E, codes = torch.zeros_like(T), torch.empty_like(T, dtype=torch.uint8)
    grids = []
    for i in range(0, T.shape[1], size):
        now = slice(i, min(i + size, T.shape[1]))
        carried = fed_back(E[:, :i], A[:i, now])
        compensated = T[:, now] + _spread(carried, A[now, now])
        s, z = fit_grids(compensated, factor.cost[now].contiguous(), config)
        grids.append((s, z))
        wide = s.expand(-1, now.stop - i), z.expand(-1, now.stop - i)
        codes[:, now], E[:, now] = _round_group(
            T[:, now], carried, A[now, now], *wide, config.max_code, rounder
        )
    scales, zeros = (torch.cat(parts, 1) for parts in zip(*grids, strict=True))
    return in_place(codes, order), scales, zeros


def _round_group(
    T: Tensor, carried: Tensor, A: Tensor, scale: Tensor, zero: Tensor, max_code: int, rounder: RoundColumns
) -> tuple[Tensor, Tensor]:
    """A group of any width, BLOCK columns at a time, so that wide groups run as GEMMs, too."""
    E, codes = torch.zeros_like(T), torch.empty_like(T, dtype=torch.uint8)
    for i in range(0, T.shape[1], BLOCK):
        now = slice(i, min(i + BLOCK, T.shape[1]))
        fed = carried[:, now] + fed_back(E[:, :i], A[:i, now])
        codes[:, now], E[:, now] = rounder(T[:, now], fed, A[now, now], scale[:, now], zero[:, now], max_code)
    return codes, E


def _spread(carried: Tensor, A: Tensor) -> Tensor:
    """Feedback on a group as GPTQ holds it at its start, X A = carried, from what LDLQ adds by column."""
    spread: Tensor = torch.linalg.solve_triangular(A, carried, upper=True, left=False, unitriangular=True)
    return spread
