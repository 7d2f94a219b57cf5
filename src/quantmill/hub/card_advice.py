"""Which branch a reader should take, computed from measurements by rules that are printed with the result.

Facts in, sentences out. Ranks only what was measured on the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from quantmill.hub.card_facts import BranchFacts
from quantmill.hub.card_format import code, size
from quantmill.hub.variants import MAIN
from quantmill.types import EvalReport


@dataclass(frozen=True, slots=True)
class Metric:
    """A loss that branches are ranked by; `good`: whether it is small enough, None where that is unknown."""

    name: str
    value: Callable[[EvalReport], float | None]
    good: Callable[[EvalReport], bool | None]
    rule: str


GOOD_KL = 0.05  # nats per token: about what well-regarded 4-bit files of 7 to 8 billion weights lose
GOOD_PERPLEXITY = 1.02
MEAN_KL = Metric(
    "mean KL",
    lambda r: r.mean_kl,
    lambda r: None if r.mean_kl is None else r.mean_kl <= GOOD_KL,
    f"the smallest file whose mean KL to the original is at most {GOOD_KL} nats per token",
)
PERPLEXITY = Metric(
    "perplexity",
    lambda r: r.perplexity,
    lambda r: (
        None if r.original_perplexity is None else r.perplexity <= GOOD_PERPLEXITY * r.original_perplexity
    ),
    f"the smallest file whose perplexity is at most {100 * (GOOD_PERPLEXITY - 1):.0f} % above the original's",
)


@dataclass(frozen=True, slots=True)
class Ranked:
    """A branch with the loss it is ranked by."""

    branch: BranchFacts
    report: EvalReport
    loss: float


def ranking(branches: Sequence[BranchFacts]) -> tuple[Metric, tuple[Ranked, ...]] | None:
    """The measured branches by size, with the metric they all have; None where measurements are not alike."""
    measured = [(b, b.measured) for b in branches if b.measured]
    if len({(r.text_sha256, r.ctx, r.windows, r.tokens) for _, r in measured}) != 1:
        return None
    metric = MEAN_KL if all(r.mean_kl is not None for _, r in measured) else PERPLEXITY
    ranked = [Ranked(b, r, metric.value(r) or 0.0) for b, r in measured]
    return metric, tuple(sorted(ranked, key=lambda r: (r.branch.size_bytes, r.loss)))


def advice(branches: Sequence[BranchFacts]) -> tuple[str, ...]:
    """Which branch to take, from the measurements alone, one point a line."""
    smallest = min(branches, key=lambda b: b.size_bytes)
    lines = [f"**Smallest file**: `{smallest.name}`, {size(smallest.size_bytes)}."]
    unmeasured = [b.name for b in branches if not b.measured]
    found = ranking(branches)
    if found:
        lines += _ranked_advice(*found)
    elif len(unmeasured) < len(branches):
        lines.append("The measurements were made on different texts or windows, so they rank nothing.")
    if unmeasured:
        lines.append(f"Not measured, and so not compared: {code(unmeasured)}.")
    return tuple(lines)


def marks(branch: BranchFacts, branches: Sequence[BranchFacts]) -> tuple[str, ...]:
    """What sets a branch apart from the others of its repository, a few words each; nothing where it is alone."""
    if len(branches) < 2:
        return ()
    found = ranking(branches)
    best = min(found[1], key=lambda r: r.loss).branch if found else None
    every = {
        "the default": branch.name == MAIN,
        "the smallest file": branch.size_bytes == min(b.size_bytes for b in branches),
        "the least loss measured": branch is best,
    }
    return tuple(words for words, holds in every.items() if holds)


def _ranked_advice(metric: Metric, ranked: tuple[Ranked, ...]) -> list[str]:
    best = min(ranked, key=lambda r: r.loss)
    lines = [f"**Smallest loss**: {_described(best, metric)}."]
    rivals = [r.branch.name for r in ranked if r is not best and _same_within_noise(r.report, best.report)]
    if rivals:
        lines[0] += f" The measurement does not tell it from {code(rivals)}: their intervals overlap."
    trade = next((r for r in ranked if metric.good(r.report)), None)
    if trade:
        lines.append(f"**Best trade**: {_described(trade, metric)}. The rule: {metric.rule}.")
    elif any(metric.good(r.report) is not None for r in ranked):
        lines.append(f"**Best trade**: none. The rule is {metric.rule}; no branch gets there.")
    for i, r in enumerate(ranked):
        better = [s for s in ranked[:i] if s.loss <= r.loss]
        if better:
            lines.append(f"`{r.branch.name}` is no smaller than `{better[0].branch.name}` and loses no less.")
    return lines


def _described(ranked: Ranked, metric: Metric) -> str:
    return f"`{ranked.branch.name}`, {size(ranked.branch.size_bytes)}, {metric.name} {ranked.loss:.4g}"


def _same_within_noise(a: EvalReport, b: EvalReport) -> bool:
    if a.mean_kl_ci is None or b.mean_kl_ci is None:
        return False
    return a.mean_kl_ci[0] <= b.mean_kl_ci[1] and b.mean_kl_ci[0] <= a.mean_kl_ci[1]
