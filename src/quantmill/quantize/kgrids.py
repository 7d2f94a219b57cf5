"""Grids of GGUF's block types: scales and minima of every group, as the file stores them. Knows no Hessian.

A linear (N, K) is N x K/group groups; `block / group` of them share the float16 d (and m). Every step minimises
sum_j c_j (w_j - scale * level_j - offset)^2 over a group's columns, c_j being what an error in column j costs
(solver.py: the squared pivots). For the K types:

    per group: (scale, offset) by weighted least squares over a family of clippings
    per block: d and dmin from the groups' scales and minima, the integers rounded, then moved one step either
               way wherever the exact error falls, then d and dmin by least squares, once more

Ideas: ggml's make_qkx3_quants and make_qp_quants (least squares per group, scales as integers), with costs that
know of the error feedback. Torch, any device; rows are taken in slices, so memory stays small.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quantmill.formats.gguf import BlockType
from quantmill.quantize.grids import SYM
from quantmill.quantize.machines import machine_of

AT_ONCE = 1 << 21  # weights in a slice of rows
SMALLEST = 1e-30
# (least, most) factor on the scale that just holds a group, and how many are tried.
CLIPS = {
    2: (0.45, 1.25, 17),
    3: (0.5, 1.1, 13),
    4: (0.6, 1.1, 11),
    5: (0.75, 1.05, 9),
    6: (0.8, 1.04, 13),
    8: (0.9, 1.02, 13),
}
D_FACTORS = tuple(1 + 0.02 * i for i in range(-8, 9))


@dataclass(frozen=True, slots=True)
class BlockGrid:
    """What a file stores of a linear beside its codes. float32 tensors hold float16 values."""

    kind: BlockType
    d: Tensor  # (N, K / block) float32
    m: Tensor | None  # alike; what is added, or multiplies `mins`
    scales: Tensor | None  # (N, K / group) int8, K types
    mins: Tensor | None  # (N, K / group) int8

    @property
    def scale(self) -> Tensor:
        """(N, K / group) float32: what levels are multiplied with."""
        wide = self.d.repeat_interleave(self.kind.block // self.kind.group, 1)
        return wide if self.scales is None else wide * self.scales.float()

    @property
    def offset(self) -> Tensor:
        """(N, K / group) float32: what is added."""
        if self.m is None:
            return torch.zeros_like(self.scale)
        wide = self.m.repeat_interleave(self.kind.block // self.kind.group, 1)
        return wide if self.mins is None else -(wide * self.mins.float())


def fit(W: Tensor, cost: Tensor, kind: BlockType) -> BlockGrid:
    """Grids of W (N, K) float32, columns weighted by cost (K,) float32. K is a multiple of kind.block."""
    parts = [_fit_rows(rows, cost, kind) for rows in _slices(W)]
    return BlockGrid(
        kind,
        torch.cat([p.d for p in parts]),
        _cat([p.m for p in parts]),
        _cat([p.scales for p in parts]),
        _cat([p.mins for p in parts]),
    )


def dequantize(grid: BlockGrid, codes: Tensor) -> Tensor:
    """W (N, K) float32, bit for bit what the file stands for. codes (N, K) uint8."""
    group = grid.kind.group
    level = codes.float() - grid.kind.zero
    return level * grid.scale.repeat_interleave(group, 1) + grid.offset.repeat_interleave(group, 1)


def half(x: Tensor) -> Tensor:
    """What float16 holds, in float32, without overflow."""
    return x.clamp(-65504.0, 65504.0).half().float()


def _slices(W: Tensor) -> Iterator[Tensor]:
    yield from torch.split(W, max(1, AT_ONCE // W.shape[1]))


def _cat(parts: list[Tensor | None]) -> Tensor | None:
    found = [p for p in parts if p is not None]
    return torch.cat(found) if found else None


def _fit_rows(W: Tensor, cost: Tensor, kind: BlockType) -> BlockGrid:
    if kind.has_min:
        scale, offset = fit_pairs(W, cost, kind)
        if not kind.is_k:
            return BlockGrid(kind, half(scale), half(offset), None, None)
        return _Blocks(W, cost, kind).with_minima(scale, -offset)
    scale = _fit_symmetric(W, cost, kind)
    if not kind.is_k:
        return BlockGrid(kind, scale, None, None, None)
    return _Blocks(W, cost, kind).without_minima(scale)


def _fit_symmetric(W: Tensor, cost: Tensor, kind: BlockType) -> Tensor:
    factors = torch.linspace(*CLIPS[kind.bits][:2], 2 * CLIPS[kind.bits][2])
    scale, _ = machine_of(W.device).fit_groups(W, cost, kind.group, kind.max_code, SYM, factors)
    return scale


def fit_pairs(W: Tensor, cost: Tensor, kind: BlockType) -> tuple[Tensor, Tensor]:
    """Scale and offset (N, K / group) float32 of every group; K types cannot store an offset above 0."""
    X, c = W.view(len(W), -1, kind.group), cost.view(-1, kind.group)
    low, high = X.amin(2), X.amax(2)
    if kind.is_k:
        low = low.clamp_max(0)
    reach = (high - low).clamp_min(SMALLEST)
    weight, square, total = c.sum(1), (c * X * X).sum(2), (c * X).sum(2)
    best = torch.full_like(low, torch.inf)
    scale, offset = reach / kind.max_code, low
    least, most, steps = CLIPS[kind.bits]
    for factor in torch.linspace(least, most, steps).tolist():
        for shift in (0.0, 0.5, 1.0) if factor < 1 else (0.0, 0.5):
            s = reach * (factor / kind.max_code)
            start = low + reach * ((1 - factor) * shift)
            q = ((X - start[..., None]) / s[..., None]).round_().clamp_(0, kind.max_code)
            cq = c * q
            sq, sqq, sxq = cq.sum(2), (cq * q).sum(2), (cq * X).sum(2)
            a, b = _least_squares(weight, sq, sqq, total, sxq, bounded=kind.is_k)
            error = square + a * a * sqq + b * b * weight + 2 * (a * b * sq - a * sxq - b * total)
            better = (error < best) & torch.isfinite(error) & (a > 0)
            best = torch.where(better, error, best)
            scale, offset = torch.where(better, a, scale), torch.where(better, b, offset)
    return scale, offset


def _least_squares(
    weight: Tensor, sq: Tensor, sqq: Tensor, sx: Tensor, sxq: Tensor, *, bounded: bool
) -> tuple[Tensor, Tensor]:
    """Scale and offset that fit codes best; an offset that may not be positive is then 0."""
    det = weight * sqq - sq * sq
    safe = det.clamp_min(SMALLEST)
    a = torch.where(det > 0, (weight * sxq - sx * sq) / safe, torch.zeros_like(det))
    b = torch.where(det > 0, (sqq * sx - sq * sxq) / safe, sx / weight.clamp_min(SMALLEST))
    if bounded:
        high = b > 0
        a = torch.where(high, sxq / sqq.clamp_min(SMALLEST), a)
        b = torch.where(high, torch.zeros_like(b), b)
    return a, b


class _Blocks:
    """Super-blocks of some rows: integers for their groups' scales and minima."""

    def __init__(self, W: Tensor, cost: Tensor, kind: BlockType) -> None:
        assert kind.scale_range is not None
        self.kind, (self.low, self.high) = kind, kind.scale_range
        per_block = kind.block // kind.group
        self.X = W.view(len(W), -1, per_block, kind.group)  # (n, blocks, groups, columns)
        self.c = cost.view(-1, per_block, kind.group)
        self.weight = self.c.sum(2)  # (blocks, groups)

    def with_minima(self, scale: Tensor, minimum: Tensor) -> BlockGrid:
        """scale, minimum (n, K / group), both at least 0."""
        wide = self.X.shape[:3]
        scale, minimum = scale.view(wide), minimum.view(wide)
        d, sc = self._whole(scale, self.high)
        m: Tensor | None
        mn: Tensor | None
        m, mn = self._whole(minimum, self.high)
        for _ in range(2):
            sc, mn = self._move(d, m, sc, mn)
            d, m = self._refit(d, m, sc, mn)
        sc, mn = self._move(d, m, sc, mn)
        assert mn is not None
        flat = (len(scale), -1)
        return BlockGrid(self.kind, d, m, sc.view(flat).to(torch.int8), mn.view(flat).to(torch.int8))

    def without_minima(self, scale: Tensor) -> BlockGrid:
        """scale (n, K / group), of either sign."""
        scale = scale.view(self.X.shape[:3])
        d, sc = self._signed(scale)
        for _ in range(2):
            sc = self._move(d, None, sc, None)[0]
            d = self._refit(d, None, sc, None)[0]
        sc = self._move(d, None, sc, None)[0]
        return BlockGrid(self.kind, d, None, sc.view(len(scale), -1).to(torch.int8), None)

    def _whole(self, wanted: Tensor, top: int) -> tuple[Tensor, Tensor]:
        """d (n, blocks) and integers 0..top (n, blocks, groups) with d * integer near `wanted`."""
        return self._nearest(wanted, wanted.amax(2) / top, 0, top)

    def _signed(self, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """The same with integers of both signs; the extreme one falls where they reach furthest."""
        at = wanted.abs().argmax(2, keepdim=True)
        return self._nearest(wanted, wanted.gather(2, at)[..., 0] / self.low, self.low, self.high)

    def _nearest(self, wanted: Tensor, start: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
        best = torch.full_like(start, torch.inf)
        d, integers = half(start), torch.zeros_like(wanted)
        for factor in D_FACTORS:
            tried = half(start * factor)
            safe = torch.where(tried == 0, torch.ones_like(tried), tried)[..., None]
            whole = (wanted / safe).round_().clamp_(low, high)
            error = ((wanted - tried[..., None] * whole).square() * self.weight).sum(2)
            better = error < best
            best, d = torch.where(better, error, best), torch.where(better, tried, d)
            integers = torch.where(better[..., None], whole, integers)
        return d, integers

    def _move(
        self, d: Tensor, m: Tensor | None, sc: Tensor, mn: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The integers, or their neighbours, whichever give a group the least error."""
        best = torch.full_like(sc, torch.inf)
        found_sc, found_mn = sc, mn
        for ds in (0, -1, 1):
            tried = (sc + ds).clamp(self.low, self.high)
            for dm in (0, -1, 1) if mn is not None else (0,):
                lower = None if mn is None else (mn + dm).clamp(0, self.high)
                error = self._error(d, m, tried, lower)
                better = error < best
                best = torch.where(better, error, best)
                found_sc = torch.where(better, tried, found_sc)
                found_mn = None if lower is None or found_mn is None else torch.where(better, lower, found_mn)
        return found_sc, found_mn

    def _levels(
        self, d: Tensor, m: Tensor | None, sc: Tensor, mn: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scale and offset (n, blocks, groups, 1), and levels of the nearest codes (n, blocks, groups, columns)."""
        scale = (d[..., None] * sc)[..., None]
        offset = torch.zeros_like(scale) if m is None or mn is None else -(m[..., None] * mn)[..., None]
        safe = torch.where(scale == 0, torch.full_like(scale, SMALLEST), scale)
        zero = self.kind.zero
        level = ((self.X - offset) / safe).round_().clamp_(-zero, self.kind.max_code - zero)
        return scale, offset, level

    def _error(self, d: Tensor, m: Tensor | None, sc: Tensor, mn: Tensor | None) -> Tensor:
        """Weighted error of every group, (n, blocks, groups)."""
        scale, offset, level = self._levels(d, m, sc, mn)
        return (level.mul_(scale).add_(offset).sub_(self.X).square_() * self.c).sum(3)

    def _refit(
        self, d: Tensor, m: Tensor | None, sc: Tensor, mn: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """d and m (n, blocks) by least squares with codes and integers held; kept where they are not worse."""
        _, _, level = self._levels(d, m, sc, mn)
        u = level * sc[..., None]
        v = torch.zeros_like(sc) if mn is None else -mn
        uu, ux = (self.c * u * u).sum((2, 3)), (self.c * u * self.X).sum((2, 3))
        uv = ((self.c * u).sum(3) * v).sum(2)
        vv, vx = (self.weight * v * v).sum(2), ((self.c * self.X).sum(3) * v).sum(2)
        det = uu * vv - uv * uv
        both = det > 1e-9 * uu * vv
        safe = torch.where(both, det, torch.ones_like(det))
        alone = ux / uu.clamp_min(SMALLEST)
        new_d = half(torch.where(both, (vv * ux - uv * vx) / safe, alone))
        new_m = None if m is None else half(torch.where(both, (uu * vx - uv * ux) / safe, m))
        gain = self._error(d, m, sc, mn).sum(2) > self._error(new_d, new_m, sc, mn).sum(2)
        return torch.where(gain, new_d, d), None if m is None or new_m is None else torch.where(
            gain, new_m, m
        )
