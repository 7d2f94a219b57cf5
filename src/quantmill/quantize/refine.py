"""One linear group under preset best: its goal in moments -> codes and scales, every choice made on held-out loss.

    shift the target -> (damping, order) tried -> LDLQ -> (coordinate descent, scale refit) x rounds

The shift: with H = E[x x^T] and R = E[y x^T], the wanted outputs y are met, up to a constant, by rounding
T = W + a (R - W H)(H + lam I)^-1 as plain GPTQ would round W (a = 1; QEP and GPTAQ are special cases). Pure
functions of tensors: knows no models, no files, no device in particular.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantmill.quantize.arithmetic import precise_product
from quantmill.quantize.columns import fed_back, in_order, in_place
from quantmill.quantize.machines import machine_of
from quantmill.quantize.moments import Goal, pooled
from quantmill.quantize.presets import Recipe
from quantmill.quantize.refit import refit
from quantmill.quantize.solver import (
    BLOCK,
    Factor,
    Solution,
    dequantize,
    energies,
    factorise,
    group_aware_order,
    refuse_non_finite,
    round_group_aware,
    round_to_grid,
    split_rows,
)
from quantmill.types import ActOrder, IntLinear, QuantConfig

SHIFTED_ROWS = 4096  # of a target at a time, which is in float64 meanwhile

Total = Callable[[list[float]], list[float]]  # sums over this process's rows -> over all processes' rows


def alone(sums: list[float]) -> list[float]:
    """`Total` where this process has all rows."""
    return sums


@dataclass(frozen=True, slots=True)
class Attempt:
    """One way to round a group: what was chosen, and how it did."""

    linear: IntLinear
    target: Tensor  # T (N, K) float32
    factor: Factor
    fallback: str | None
    order: str
    loss: Tensor  # (N,) float64 on the judge's tokens


@dataclass(frozen=True, slots=True)
class Shift:
    """How far a module's target was moved, and how firmly: strength a and ridge, a share of the mean diagonal."""

    strength: float
    ridge: float


def solve_best(
    weights: Sequence[Tensor],
    fit: Goal,
    held: Goal | None,
    config: QuantConfig,
    recipe: Recipe,
    total: Total = alone,
) -> list[Solution]:
    """Quantise linears that read the same inputs. weights: (N_i, K) float32; goals of the stacked rows.

    Without held-out tokens the fit tokens judge. total: adds up what choices go by, where other processes solve
    other rows of the same linears; N_i may then be 0. Raises BadCheckpoint for NaN or infinity.
    """
    W, rows = torch.cat(list(weights)), [len(w) for w in weights]
    refuse_non_finite(W, fit.H)
    judge = held or fit
    T, shifts = choose_target(W, rows, fit, judge, recipe, total)
    best = min(_attempts(T, fit, judge, config, recipe), key=lambda a: total([float(a.loss.sum())]))
    if recipe.pooled and held is not None:
        best = _again(W, rows, pooled(fit, held), best, shifts, config)
    linear, steps = polish(best, rows, judge, config, recipe.rounds, total)
    parts = split_rows(linear, rows)
    losses = _losses(weights, parts, fit, total)
    return [_report(*one, best) for one in zip(parts, losses, shifts, steps, strict=True)]


def choose_target(
    W: Tensor, rows: list[int], fit: Goal, judge: Goal, recipe: Recipe, total: Total = alone
) -> tuple[Tensor, tuple[Shift, ...]]:
    """T = W + a (R - W H)(H + ridge I)^-1 with a and ridge per module by the judge's loss of T unrounded."""
    T, chosen, least = W.clone(), [Shift(0.0, 0.0)] * len(rows), [0.0] * len(rows)
    pull = pull_of(W, fit)
    against = pull if judge is fit else pull_of(W, judge)
    for ridge in recipe.shift_ridges:
        step = shift_step(pull, fit.H, ridge)
        slope = (against * step).sum(1, dtype=torch.float64) * -2
        bend = (precise_product(step, judge.H) * step).sum(1, dtype=torch.float64)
        sums = total(_by_module(slope, rows) + _by_module(bend, rows))
        start = 0
        for i, count in enumerate(rows):
            now = slice(start, start + count)
            a, b = sums[i], sums[len(rows) + i]
            strength = min(recipe.shifts, key=lambda s: s * a + s * s * b)
            if strength * a + strength**2 * b < least[i]:
                least[i], chosen[i] = strength * a + strength**2 * b, Shift(strength, ridge)
                T[now] = W[now] + strength * step[now]
            start += count
    return T, tuple(chosen)


def _by_module(per_row: Tensor, rows: list[int]) -> list[float]:
    """Sums over each module's rows."""
    return [float(part.sum()) for part in torch.split(per_row, rows)]


def pull_of(W: Tensor, goal: Goal) -> Tensor:
    """R - W H, (N, K) float32: what W leaves of the goal."""
    return goal.R - precise_product(W, goal.H)


def shift_step(pull: Tensor, H: Tensor, ridge: float) -> Tensor:
    """(R - W H)(H + ridge I)^-1, (N, K) float32: the full shift; ridge as a share of H's mean diagonal."""
    damped = H.double()
    damped.diagonal().add_(ridge * float(damped.diagonal().mean()) + 1e-30)
    L, info = torch.linalg.cholesky_ex(damped)
    del damped  # a wide linear's float64 matrices decide how much memory a GPU needs
    step = torch.zeros_like(pull)
    if not int(info):
        pieces = (torch.split(t, SHIFTED_ROWS) for t in (step, pull))
        for now, rows in zip(*pieces, strict=True):
            now.copy_(torch.cholesky_solve(rows.double().T, L).T)
    return step


def _attempts(T: Tensor, fit: Goal, judge: Goal, config: QuantConfig, recipe: Recipe) -> Iterator[Attempt]:
    """One after the other, so that no more than two are held at a time."""
    for damp in recipe.damps or (config.damp_percent,):
        tried = replace(config, damp_percent=damp)
        for order in usable_orders(recipe.orders, tried, T.shape[1]):
            yield _round(T, order, fit, judge, tried)


def _again(
    W: Tensor, rows: list[int], goal: Goal, chosen: Attempt, shifts: Sequence[Shift], config: QuantConfig
) -> Attempt:
    """The chosen attempt once more, on all tokens."""
    T = W.clone()
    for ridge in {s.ridge for s in shifts if s.strength}:
        strengths = [s.strength if s.ridge == ridge else 0.0 for s in shifts]
        T += per_row(strengths, rows, W.device) * shift_step(pull_of(W, goal), goal.H, ridge)
    config = replace(config, damp_percent=chosen.factor.damp_percent)
    return _round(T, chosen.order, goal, goal, config)


def usable_orders(orders: Sequence[str], config: QuantConfig, in_features: int) -> tuple[str, ...]:
    """The orders that keep groups consecutive and can be had for this shape; the user's own where not static."""
    if config.act_order is not ActOrder.STATIC:
        return ("as asked",)
    whole = in_features % config.effective_group(in_features) == 0
    return tuple(o for o in orders if o != "group-aware" or whole)


def _round(T: Tensor, order: str, fit: Goal, judge: Goal, config: QuantConfig) -> Attempt:
    aware = order == "group-aware"
    columns = group_aware_order(fit.H.diagonal(), config) if aware else None
    factor, fallback = factorise(fit.H, config, columns)
    linear = (round_group_aware if aware else round_to_grid)(T, factor, config)
    return Attempt(linear, T, factor, fallback, order, judge.loss(dequantize(linear)))


def per_row(values: Sequence[float], rows: list[int], device: torch.device) -> Tensor:
    """One value per module -> one per stacked row, (N, 1)."""
    counts = torch.tensor(rows, device=device)
    return torch.repeat_interleave(torch.tensor(values, device=device), counts)[:, None]


def polish(
    start: Attempt, rows: list[int], judge: Goal, config: QuantConfig, rounds: int, total: Total = alone
) -> tuple[IntLinear, list[int]]:
    """(descent, refit) x rounds; a module keeps a step only if its loss on the judge's tokens falls.

    Returns the linear and how many steps each module kept.
    """
    linear, loss = start.linear, judge.loss(dequantize(start.linear))
    least = total(_by_module(loss, rows))
    kept = [0] * len(rows)
    steps: tuple[Callable[[IntLinear], IntLinear], ...] = (
        lambda now: refit(start.target, start.factor.damped, now),
        lambda now: descend(start.target, start.factor.damped, now, config.max_code),
    )
    for step in [steps[0], *(s for _ in range(rounds) for s in (steps[1], steps[0]))]:
        tried = step(linear)
        after = judge.loss(dequantize(tried))
        sums = total(_by_module(after, rows))
        falls = [b < a for a, b in zip(least, sums, strict=True)]
        kept = [k + f for k, f in zip(kept, falls, strict=True)]
        if not any(falls):
            continue
        take = per_row([float(f) for f in falls], rows, loss.device)[:, 0] > 0
        linear, least = _merge(take, tried, linear), [min(pair) for pair in zip(least, sums, strict=True)]
    return linear, kept


def _merge(take: Tensor, new: IntLinear, old: IntLinear) -> IntLinear:
    pick = take[:, None]
    return IntLinear(
        torch.where(pick, new.codes, old.codes),
        torch.where(pick, new.scales, old.scales),
        torch.where(pick, new.zeros, old.zeros),
        old.g_idx,
    )


def descend(T: Tensor, H: Tensor, linear: IntLinear, max_code: int) -> IntLinear:
    """One sweep of coordinate descent over all columns, most active first. T (N, K), H (K, K) float32."""
    order = torch.argsort(H.diagonal(), descending=True, stable=True)
    g = linear.g_idx.long()[order]
    scales, zeros = linear.scales.float(), linear.zeros.float()
    Hp, E = H[order][:, order], in_order(T - dequantize(linear), order)
    Tp, codes = in_order(T, order), torch.empty_like(E, dtype=torch.uint8)
    block = machine_of(T.device).descend_block
    for i in range(0, T.shape[1], BLOCK):
        now = slice(i, min(i + BLOCK, T.shape[1]))
        s, z = in_order(scales, g[now]), in_order(zeros, g[now])
        codes[:, now], values = block(
            Tp[:, now] - E[:, now], fed_back(E, Hp[:, now]), Hp[now, now], s, z, max_code
        )
        E[:, now] = Tp[:, now] - values
    return IntLinear(in_place(codes, order), linear.scales, linear.zeros, linear.g_idx)


def _losses(weights: Sequence[Tensor], parts: Sequence[IntLinear], fit: Goal, total: Total) -> list[float]:
    """Every module's `solver.relative_loss` on the fit tokens, over the rows of all processes."""
    pairs = zip(weights, parts, strict=True)
    found = torch.stack([energies(w, dequantize(part), fit.H).sum(0) for w, part in pairs])
    sums = torch.tensor(total(found.flatten().tolist()), dtype=torch.float64).view(-1, 2).tolist()
    return [wrong / whole if whole > 0 else 0.0 for wrong, whole in sums]


def _report(part: IntLinear, loss: float, shift: Shift, kept: int, chosen: Attempt) -> Solution:
    damp = chosen.factor.damp_percent
    said = (
        f"damp {damp:g}, {chosen.order}, shift {shift.strength:g} (ridge {shift.ridge:g}), {kept} refinements"
    )
    return Solution(part, loss, damp, chosen.fallback, said)
