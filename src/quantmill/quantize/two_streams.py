"""One decoder block run in two streams at once: the original's activations beside the quantised model's.

Like `lanes.TappedBlock`, every batch is a greenlet that stops at the first linear of a group, but there is a
pair of them per batch: one multiplies with the original weights on what the original model would see, one
with the current (quantised) weights on what the quantised model will see. When all pairs have arrived, the
group's moments are complete. Linears that write to the residual stream also give the gap between both
streams' residuals, which they are asked to close. Knows nothing of quantisation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from quantmill.architectures import LinearGroup
from quantmill.quantize.arithmetic import product
from quantmill.quantize.moments import Moments

RESIDUAL_WRITERS = frozenset({"o", "down"})  # groups whose output is added to the residual stream as it is


class Lane(greenlet):
    """One batch in one stream; `residual` is what the next writer's output will be added to."""

    def __init__(self, run: Callable[[Tensor], Tensor], original: bool, hidden: Tensor) -> None:
        super().__init__(run)
        self.original, self.residual = original, hidden


@dataclass(frozen=True, slots=True)
class Pair:
    """Hidden states (B, L, hidden) of the same tokens in both streams."""

    quantised: Tensor
    original: Tensor


AtGroup = Callable[[LinearGroup, Moments, Moments | None], None]
Frame = Mapping[str, Any]


class PairTap(nn.Module):
    """Stands in for a linear: stops lanes at their group, multiplies with the weight of the lane's stream."""

    def __init__(self, owner: PairedBlock, name: str, linear: nn.Linear) -> None:
        super().__init__()
        self.owner, self.name, self.linear = (owner,), name, linear  # a tuple: no submodule of its own
        self.source = linear.weight.detach().to(owner.matmul_dtype)
        self.current = self.source

    def use(self, weight: Tensor) -> None:
        """From now on the quantised stream multiplies with `weight` (N, K)."""
        self.current = weight.to(self.owner[0].matmul_dtype)

    def forward(self, x: Tensor) -> Tensor:
        owner, lane = self.owner[0], getcurrent()
        assert isinstance(lane, Lane), "a tap was called outside of a lane"
        if x.device.type != "cpu":
            x = x.to(owner.matmul_dtype)  # rounded once, for the moments and for the product
        group = owner.group_of[self.name]
        if group.name not in owner.passed:
            conductor = lane.parent
            assert conductor is not None, "lanes have the conductor for a parent"
            conductor.switch((group, x, lane.residual))
        weight = self.source if lane.original else self.current
        y = product(x, weight)
        y = y if self.linear.bias is None else y + self.linear.bias
        if group.name in RESIDUAL_WRITERS:
            lane.residual = lane.residual + y
        return y


class PairedBlock:
    """A decoder block whose linears are paired taps for as long as the `with` lasts."""

    def __init__(self, block: nn.Module, groups: Sequence[LinearGroup], matmul_dtype: torch.dtype) -> None:
        self.block, self.groups, self.matmul_dtype = block, groups, matmul_dtype
        self.group_of = {m: group for group in groups for m in group.modules}
        self.passed: set[str] = set()
        self.taps = {m: PairTap(self, m, self._linear(m)) for m in self.group_of}

    def _linear(self, module: str) -> nn.Linear:
        linear = self.block.get_submodule(module)
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{module} is a {type(linear).__name__}, not a Linear")
        return linear

    def __enter__(self) -> PairedBlock:
        for module, tap in self.taps.items():
            _set(self.block, module, tap)
        return self

    def __exit__(self, *_: object) -> None:
        for module, tap in self.taps.items():
            _set(self.block, module, tap.linear)

    def weight(self, module: str) -> Tensor:
        """The original weight (N, K) float32 of a linear."""
        return self.taps[module].linear.weight.detach().float()

    def run(
        self, pairs: Sequence[Pair], frames: Sequence[Frame], held: int, residual: bool, at_group: AtGroup
    ) -> list[Pair]:
        """Outputs of all pairs; the last `held` of them fill the second moments instead of the first."""
        self.passed.clear()
        lanes = [
            (self._lane(frame, pair.quantised, False), self._lane(frame, pair.original, True))
            for pair, frame in zip(pairs, frames, strict=True)
        ]
        answers = [
            (q.switch(p.quantised), o.switch(p.original)) for (q, o), p in zip(lanes, pairs, strict=True)
        ]
        for group in self.groups:
            cut = len(answers) - held
            gaps = residual and group.name in RESIDUAL_WRITERS
            fit = collect(group, answers[:cut], gaps)
            judge = collect(group, answers[cut:], gaps) if held else None
            answers.clear()
            at_group(group, fit, judge)
            self.passed.add(group.name)
            answers = [(q.switch(), o.switch()) for q, o in lanes]
        return [Pair(q, o) for q, o in answers]

    def _lane(self, frame: Frame, hidden: Tensor, original: bool) -> Lane:
        def forward(h: Tensor) -> Tensor:
            out = self.block(h, **frame)
            first: Tensor = out[0] if isinstance(out, tuple) else out
            return first

        return Lane(forward, original, hidden)


Arrival = tuple[LinearGroup, Tensor, Tensor]


def collect(group: LinearGroup, answers: Sequence[tuple[Arrival, Arrival]], gaps: bool) -> Moments:
    """The moments over all pairs' inputs."""
    x = answers[0][0][1]
    moments = Moments(x.shape[-1], x.device)
    for (arrived, mine, residual), (_, original, wanted) in answers:
        if arrived.name != group.name:
            raise RuntimeError(f"the block runs {arrived.name} where the table says {group.name}")
        moments.add(mine, original, wanted - residual if gaps else None)
    return moments


def _set(block: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(block.get_submodule(parent), leaf, module)
