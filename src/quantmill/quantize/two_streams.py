"""One decoder block run in two streams at once: the original's activations beside the quantised model's.

Like `lanes.TappedBlock`, every batch is a greenlet that stops at the first linear of a group, but there is a
pair of them per batch: one multiplies with the original weights on what the original model would see, one
with the current (quantised) weights on what the quantised model will see. When all pairs have arrived, the
group's moments are complete. Linears that write to the residual stream also give the gap between both
streams' residuals, which they are asked to close. Knows nothing of quantisation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
Keep = Callable[[int, Pair], None]
Arrival = tuple[LinearGroup, Tensor, Tensor]  # the group, its inputs, the residual its output is added to
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
        self,
        pairs: Sequence[Pair],
        frames: Sequence[Frame],
        held: int,
        residual: bool,
        at_group: AtGroup,
        *,
        keep: Keep | None = None,
        waiting: bool = True,
    ) -> list[Pair]:
        """Outputs of all pairs, unless `keep(i, output)` takes them one by one.

        The last `held` pairs fill the second moments instead of the first. Pairs that are not `waiting` start
        again for every group, one at a time, as in `lanes.TappedBlock.run`.
        """
        self.passed.clear()
        done: list[Pair] = []
        keep = keep or (lambda _, pair: done.append(pair))
        if waiting:
            self._run_waiting(pairs, frames, held, residual, at_group, keep)
        else:
            self._run_again(pairs, frames, held, residual, at_group, keep)
        return done

    def _run_waiting(
        self,
        pairs: Sequence[Pair],
        frames: Sequence[Frame],
        held: int,
        residual: bool,
        at_group: AtGroup,
        keep: Keep,
    ) -> None:
        lanes, answers, cut = [], [], len(pairs) - held
        for pair, frame in zip(pairs, frames, strict=True):
            q, o = self._lanes(pair, frame)
            lanes.append((q, o))
            answers.append((q.switch(pair.quantised), o.switch(pair.original)))
        for group in self.groups:
            gaps = residual and group.name in RESIDUAL_WRITERS
            fit = collect(group, answers[:cut], gaps)
            judge = collect(group, answers[cut:], gaps) if held else None
            answers.clear()
            at_group(group, fit, judge)
            self.passed.add(group.name)
            if group is not self.groups[-1]:
                answers = [(q.switch(), o.switch()) for q, o in lanes]
        while lanes:
            q, o = lanes.pop(0)
            keep(len(frames) - len(lanes) - 1, Pair(q.switch(), o.switch()))

    def _run_again(
        self,
        pairs: Sequence[Pair],
        frames: Sequence[Frame],
        held: int,
        residual: bool,
        at_group: AtGroup,
        keep: Keep,
    ) -> None:
        cut = len(pairs) - held
        for group in self.groups:
            gaps = residual and group.name in RESIDUAL_WRITERS
            fit = collect(group, self._arrivals(pairs, frames, range(cut)), gaps)
            rest = range(cut, len(pairs))
            judge = collect(group, self._arrivals(pairs, frames, rest), gaps) if held else None
            at_group(group, fit, judge)
            self.passed.add(group.name)
        self.forward(pairs, frames, keep)

    def forward(self, pairs: Sequence[Pair], frames: Sequence[Frame], keep: Keep) -> None:
        """Send all pairs through with the weights as they are, stopping nowhere."""
        self.passed.update(group.name for group in self.groups)
        for i, frame in enumerate(frames):
            pair = pairs[i]
            q, o = self._lanes(pair, frame)
            keep(i, Pair(q.switch(pair.quantised), o.switch(pair.original)))

    def _arrivals(
        self, pairs: Sequence[Pair], frames: Sequence[Frame], which: range
    ) -> Iterator[tuple[Arrival, Arrival]]:
        """What these pairs bring to the next group, one at a time."""
        for i in which:
            pair = pairs[i]
            q, o = self._lanes(pair, frames[i])
            yield q.switch(pair.quantised), o.switch(pair.original)
            q.throw()  # its frames, and what they hold, are given up
            o.throw()

    def _lanes(self, pair: Pair, frame: Frame) -> tuple[Lane, Lane]:
        return self._lane(frame, pair.quantised, False), self._lane(frame, pair.original, True)

    def _lane(self, frame: Frame, hidden: Tensor, original: bool) -> Lane:
        def forward(h: Tensor) -> Tensor:
            out = self.block(h, **frame)
            first: Tensor = out[0] if isinstance(out, tuple) else out
            return first

        return Lane(forward, original, hidden)


def collect(group: LinearGroup, answers: Iterable[tuple[Arrival, Arrival]], gaps: bool) -> Moments:
    """The moments over all pairs' inputs; there is at least one pair."""
    moments: Moments | None = None
    for (arrived, mine, residual), (_, original, wanted) in answers:
        if arrived.name != group.name:
            raise RuntimeError(f"the block runs {arrived.name} where the table says {group.name}")
        moments = moments or Moments(mine.shape[-1], mine.device)
        moments.add(mine, original, wanted - residual if gaps else None)
    assert moments is not None, "a block needs tokens"
    return moments


def _set(block: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(block.get_submodule(parent), leaf, module)
