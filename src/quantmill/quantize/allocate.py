"""Bits for every part of a model under a limit on its size or its loss. Knows numbers only: no tensors, no model.

A part is a group of linears that readers fuse (q, k, v; gate, up), so they share one setting. Losses of parts
add up, as far as they are small. Per part only the choices on the lower convex hull of bytes against loss can
be worth their bytes; all parts' steps along their hulls, best ratio first, give the least loss for every size
that such steps reach (Lagrange multipliers, Shoham and Gersho 1988).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from quantmill.errors import BadRequest
from quantmill.types import QuantConfig


@dataclass(frozen=True, slots=True)
class Choice:
    """One setting of a part: what it costs and what it loses."""

    config: QuantConfig
    size: int  # bytes
    loss: float  # nats per token it adds to the model's KL divergence


@dataclass(frozen=True, slots=True)
class Part:
    """Linears with one setting, and the settings there are."""

    name: str
    modules: tuple[str, ...]
    choices: tuple[Choice, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """Going from one choice of a part to the next on its hull."""

    part: int
    rank: int
    to: Choice
    size: int
    gain: float


def within_size(parts: Sequence[Part], most: int) -> list[Choice]:
    """A choice per part with the least loss in at most `most` bytes. Raises BadRequest where nothing fits."""
    chosen = [hull(p.choices)[0] for p in parts]
    left = most - sum(c.size for c in chosen)
    if left < 0:
        raise BadRequest(
            f"the linears take {most - left} bytes at least, {most} are left for them: allow more"
        )
    stopped: set[int] = set()
    for step in _steps(parts):
        if step.part in stopped or step.size > left:
            stopped.add(step.part)
            continue
        chosen[step.part], left = step.to, left - step.size
    return chosen


def within_loss(parts: Sequence[Part], most: float) -> list[Choice]:
    """A choice per part in the fewest bytes with at most `most` nats. Raises BadRequest where none will do."""
    chosen = [hull(p.choices)[0] for p in parts]
    for step in _steps(parts):
        if sum(c.loss for c in chosen) <= most:
            return chosen
        chosen[step.part] = step.to
    least = sum(c.loss for c in chosen)
    if least > most:
        raise BadRequest(f"the least loss that can be had is {least:.3g} nats, not {most:.3g}: allow more")
    return chosen


def hull(choices: Sequence[Choice]) -> list[Choice]:
    """The choices on the lower convex hull of size against loss, smallest first."""
    kept: list[Choice] = []
    for c in sorted(choices, key=lambda c: (c.size, c.loss)):
        if kept and c.loss >= kept[-1].loss:
            continue
        while len(kept) > 1 and _slope(kept[-2], kept[-1]) <= _slope(kept[-1], c):
            kept.pop()
        kept.append(c)
    return kept


def _slope(a: Choice, b: Choice) -> float:
    """Loss saved per byte spent from a to b."""
    return (a.loss - b.loss) / (b.size - a.size)


def _steps(parts: Sequence[Part]) -> list[Step]:
    steps = []
    for number, part in enumerate(parts):
        on_hull = hull(part.choices)
        for rank, (a, b) in enumerate(pairwise(on_hull)):
            steps.append(Step(number, rank, b, b.size - a.size, a.loss - b.loss))
    return sorted(steps, key=lambda s: (-s.gain / s.size, s.part, s.rank))
