"""Several ranks in one process, by turns: what a rank of `runtime.parallel.team` sees, without processes.

`together(2, job)` calls job(team) for every rank; where all have to add up, each waits until the others are there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import greenlet
import torch


class LockstepTeam:
    """The team of one rank."""

    captured = False

    def __init__(self, rounds: dict[int, dict[int, Any]], rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._rounds, self._round = rounds, 0

    @property
    def first(self) -> bool:
        return self.rank == 0

    def add_up(self, part: torch.Tensor) -> torch.Tensor:
        parts = self._exchange(part.clone())
        total = parts[0].clone()
        for other in parts[1:]:
            total += other
        return part.copy_(total)

    def least(self, number: int) -> int:
        return min(self._exchange(number))

    def total(self, numbers: list[float]) -> list[float]:
        return [sum(column) for column in zip(*self._exchange(numbers), strict=True)]

    def _exchange(self, value: Any) -> list[Any]:
        """What every rank gave in this round."""
        given = self._rounds[self._round]
        self._round += 1
        given[self.rank] = value
        while len(given) < self.size:
            greenlet.getcurrent().parent.switch()
        return [given[rank] for rank in range(self.size)]


def together(size: int, job: Callable[[LockstepTeam], Any]) -> list[Any]:
    """The results of job(team) of every rank."""
    rounds: dict[int, dict[int, Any]] = defaultdict(dict)
    results: list[Any] = [None] * size

    def run(team: LockstepTeam) -> None:
        results[team.rank] = job(team)

    with torch.inference_mode():  # each rank enters it, too: so that one that leaves does not end it for all
        lanes = [greenlet.greenlet(run) for _ in range(size)]
        for rank, lane in enumerate(lanes):
            lane.switch(LockstepTeam(rounds, rank, size))
        while not all(lane.dead for lane in lanes):
            for lane in lanes:
                if not lane.dead:
                    lane.switch()
    return results
