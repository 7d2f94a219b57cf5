"""Bits under a limit: against brute force over all combinations, convexity, refusals."""

from __future__ import annotations

import itertools
import random

import pytest

from quantmill.errors import BadRequest
from quantmill.quantize.allocate import Choice, Part, hull, within_loss, within_size
from quantmill.types import QuantConfig

CONFIGS = [QuantConfig(bits=b) for b in (2, 3, 4, 8)]


def parts(seed: int, count: int = 5) -> list[Part]:
    draw = random.Random(seed)
    made = []
    for i in range(count):
        weight, scale = draw.randint(1, 9), draw.uniform(0.01, 1)
        noise = [draw.uniform(0.7, 1.3) for _ in CONFIGS]
        choices = [
            Choice(c, weight * c.bits, scale * 4.0**-c.bits * n) for c, n in zip(CONFIGS, noise, strict=True)
        ]
        made.append(Part(f"part{i}", (f"part{i}.linear",), tuple(choices)))
    return made


def totals(chosen: list[Choice]) -> tuple[int, float]:
    return sum(c.size for c in chosen), sum(c.loss for c in chosen)


@pytest.mark.parametrize("seed", range(8))
def test_within_a_size_it_is_close_to_the_best_of_all_combinations(seed: int) -> None:
    table = parts(seed)
    sizes = [min(c.size for c in p.choices) for p in table], [max(c.size for c in p.choices) for p in table]
    for share in (0.0, 0.3, 0.6, 1.0):
        most = round(sum(sizes[0]) + share * (sum(sizes[1]) - sum(sizes[0])))
        size, loss = totals(within_size(table, most))
        every = (totals(list(c)) for c in itertools.product(*(p.choices for p in table)))
        best = min(one_loss for one_size, one_loss in every if one_size <= most)
        assert size <= most
        assert loss <= 1.6 * best + 1e-9  # a step of a part that does not fit is left out, no more


@pytest.mark.parametrize("seed", range(4))
def test_within_a_loss_it_is_close_to_the_smallest_of_all_combinations(seed: int) -> None:
    table = parts(seed)
    every = [totals(list(c)) for c in itertools.product(*(p.choices for p in table))]
    for most in (1e-3, 1e-2, 3e-2):
        if min(loss for _, loss in every) > most:
            continue
        size, loss = totals(within_loss(table, most))
        assert loss <= most
        assert size <= 1.15 * min(s for s, one in every if one <= most)


def test_more_room_never_loses_more() -> None:
    table = parts(3)
    losses = [totals(within_size(table, most))[1] for most in range(60, 200, 7)]
    assert losses == sorted(losses, reverse=True)


def test_the_hull_leaves_out_what_is_never_worth_it() -> None:
    a, b, c, d = (Choice(CONFIGS[0], s, e) for s, e in ((1, 10.0), (2, 9.5), (3, 1.0), (4, 1.2)))
    assert hull([d, c, b, a]) == [a, c]


def test_refusals() -> None:
    with pytest.raises(BadRequest, match="at least"):
        within_size(parts(0), 3)
    with pytest.raises(BadRequest, match="least loss"):
        within_loss(parts(0), 1e-12)
