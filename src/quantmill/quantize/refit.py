"""Scales refitted to fixed codes: the least-squares optimum of every row, in closed form.

Per row, with B (K, groups) the centred codes spread over the columns' groups: M = B^T H B, r = B^T H w,
s = (M + rho I)^-1 (r + rho s_old), rounded to float16. The loss is w^T H w - 2 s^T r + s^T M s. Rows that do
not gain keep their scales.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quantmill.quantize.arithmetic import precise_product
from quantmill.quantize.machines import machine_of
from quantmill.types import IntLinear

CHUNK = 1 << 27  # elements of M at a time: the numbers of a few thousand rows


def refit(W: Tensor, H: Tensor, linear: IntLinear, ridge: float = 1e-3) -> IntLinear:
    """The linear with refitted scales. W (N, K), H (K, K) float32; codes and zeros stay as they are."""
    g, old = linear.g_idx.long(), linear.scales.float()
    by_group = torch.argsort(g, stable=True)
    sizes = torch.bincount(g, minlength=old.shape[1]).tolist()
    width = max(16, 1 << (max(sizes) - 1).bit_length())
    if machine_of(W.device).fused_refit(width):
        scales = _refit_fused(W, H, linear, by_group, sizes, width, ridge)
    else:
        scales = _refit_plain(W, H, linear, by_group, ridge)
    return IntLinear(linear.codes, scales.half(), linear.zeros, linear.g_idx)


# ---- any device, float64


def _refit_plain(W: Tensor, H: Tensor, linear: IntLinear, by_group: Tensor, ridge: float) -> Tensor:
    g, old = linear.g_idx.long(), linear.scales.float()
    centred = (linear.codes.float() - linear.zeros.float()[:, g])[:, by_group]
    ordered = H[by_group][:, by_group]
    right = (W @ H)[:, by_group] * centred
    spread = nn.functional.one_hot(g[by_group], old.shape[1]).float()
    scales = torch.empty_like(old)
    step = max(1, CHUNK // (8 * old.shape[1] ** 2))
    for rows in torch.split(torch.arange(len(W), device=W.device), step):
        M = group_products(ordered, centred[rows], spread)
        scales[rows] = _best_scales(M, (right[rows] @ spread).double(), old[rows], ridge)
    return scales


def group_products(H: Tensor, centred: Tensor, spread: Tensor) -> Tensor:
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
    new = _storable(torch.linalg.solve(damped, r + rho * old), old)
    gain = _quadratic(M, r, old) - _quadratic(M, r, new)
    return torch.where(gain[:, None] > 0, new, old)


def _storable(exact: Tensor, old: Tensor) -> Tensor:
    """Scales as float16 holds them; the old one where float16 has none or the sign would turn."""
    stored = exact.half().float()
    usable = torch.isfinite(stored) & (stored != 0) & (stored.sign() == old.sign())
    return torch.where(usable, stored, old)


def _quadratic(M: Tensor, r: Tensor, s: Tensor) -> Tensor:
    """s^T M s - 2 s^T r for every row, (n,) float64."""
    wide = s.double()
    return torch.einsum("ni,nij,nj->n", wide, M, wide) - 2 * (wide * r).sum(1)


# ---- a GPU, float32


def _refit_fused(
    W: Tensor, H: Tensor, linear: IntLinear, by_group: Tensor, sizes: list[int], width: int, ridge: float
) -> Tensor:
    from quantmill.quantize.refit_triton import group_products as fused
    from quantmill.quantize.refit_triton import split

    old, groups = linear.scales.float(), len(sizes)
    place = padded_places(sizes, width, W.device)
    g = linear.g_idx.long()
    codes = torch.zeros(len(W), groups * width, dtype=torch.bfloat16, device=W.device)
    codes[:, place] = (linear.codes[:, by_group].to(torch.int16) - linear.zeros[:, g[by_group]]).bfloat16()
    parts = split(_spread_out(H, by_group, place, groups * width))
    pull = torch.zeros(len(W), groups * width, device=W.device)
    pull[:, place] = precise_product(W, H)[:, by_group]
    r = (pull.mul_(codes)).view(len(W), groups, width).sum(2)
    scales = torch.empty_like(old)
    for now in torch.split(torch.arange(len(W), device=W.device), max(128, CHUNK // groups**2)):
        rows = slice(int(now[0]), int(now[-1]) + 1)
        scales[rows] = best_scales_fast(fused(parts, codes[rows], width), r[rows], old[rows], ridge)
    return scales


def padded_places(sizes: list[int], width: int, device: torch.device) -> Tensor:
    """Where columns sorted by group lie when every group takes `width` places; (K,) int64."""
    places = [torch.arange(size) + i * width for i, size in enumerate(sizes)]
    return torch.cat(places).to(device)


def _spread_out(H: Tensor, by_group: Tensor, place: Tensor, padded: int) -> Tensor:
    """H with its columns at their places, zeros between."""
    where = torch.full((padded,), -1, device=H.device)
    where[place] = by_group
    there = where >= 0
    wide = H[where.clamp_min(0)][:, where.clamp_min(0)]
    return wide if bool(there.all()) else wide * (there[:, None] & there)


def best_scales_fast(M: Tensor, r: Tensor, old: Tensor, ridge: float) -> Tensor:
    """`_best_scales` in float32, M (n, groups, groups): finer than the float16 that scales are rounded to."""
    rho = ridge * M.diagonal(dim1=1, dim2=2).mean(1, keepdim=True) + 1e-30
    damped = M.clone()
    damped.diagonal(dim1=1, dim2=2).add_(rho)
    L, failed = torch.linalg.cholesky_ex(damped)
    exact = torch.cholesky_solve((r + rho * old)[:, :, None], L)[:, :, 0]
    new = _storable(torch.where(failed[:, None] == 0, exact, old), old)
    step = new - old
    gain = (step * (2 * (r - _times(M, old)) - _times(M, step))).sum(1)  # without cancellation
    return torch.where(gain[:, None] > 0, new, old)


def _times(M: Tensor, x: Tensor) -> Tensor:
    return torch.bmm(M, x[:, :, None])[:, :, 0]
