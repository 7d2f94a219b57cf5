"""One decoder block run over many batches at once, stopping at every linear group until it has been solved.

True-sequential quantisation wants each group's inputs to come from the quantised groups before it, and each
linear to run once. So every batch is a *lane*: a greenlet that runs Transformers' own block forward and
hands over at the first linear of each group. Once all lanes have arrived, the group is solved, its weights
are replaced, and the lanes go on. A waiting lane holds its residual and the group's input, nothing else.
Knows nothing of quantisation: `at_group` decides what happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from quantmill.architectures import LinearGroup
from quantmill.quantize.arithmetic import product
from quantmill.quantize.hessian import Hessian

AtGroup = Callable[[LinearGroup, Hessian], None]
Keep = Callable[[int, Tensor], None]
Frame = Mapping[str, Any]  # the keyword arguments Transformers passes to this block


@dataclass
class Gate:
    """Where lanes wait: groups in running order, and which have been passed."""

    group_of: dict[str, LinearGroup]
    passed: set[str] = field(default_factory=set)

    def arrive(self, module: str, x: Tensor) -> None:
        group = self.group_of[module]
        if group.name not in self.passed:
            conductor = getcurrent().parent
            assert conductor is not None, "a tap was called outside of a lane"
            conductor.switch((group, x))


class Tap(nn.Module):
    """Stands in for a linear: tells the gate what came in, then multiplies with the current weight."""

    def __init__(self, name: str, linear: nn.Linear, gate: Gate, matmul_dtype: torch.dtype) -> None:
        super().__init__()
        self.name, self.gate, self.matmul_dtype = name, gate, matmul_dtype
        self.original = linear
        self.current: Tensor | None = None  # the original weight, until another is to be used

    def use(self, weight: Tensor) -> None:
        """From now on multiply with `weight` (N, K)."""
        self.current = weight.to(self.matmul_dtype)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            x = x.to(self.matmul_dtype)  # rounded once, for the Hessian and for the product
        self.gate.arrive(self.name, x)
        weight = self.original.weight.detach() if self.current is None else self.current
        y = product(x, weight.to(self.matmul_dtype))
        return y if self.original.bias is None else y + self.original.bias


class TappedBlock:
    """A decoder block whose linears are taps for as long as the `with` lasts."""

    def __init__(self, block: nn.Module, groups: Sequence[LinearGroup], matmul_dtype: torch.dtype) -> None:
        self.block, self.groups = block, groups
        self.gate = Gate({m: group for group in groups for m in group.modules})
        self.taps = {m: Tap(m, self._linear(m), self.gate, matmul_dtype) for m in self.gate.group_of}

    def _linear(self, module: str) -> nn.Linear:
        linear = self.block.get_submodule(module)
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{module} is a {type(linear).__name__}, not a Linear")
        return linear

    def __enter__(self) -> TappedBlock:
        for module, tap in self.taps.items():
            _set(self.block, module, tap)
        return self

    def __exit__(self, *_: object) -> None:
        for module, tap in self.taps.items():
            _set(self.block, module, tap.original)

    def weight(self, module: str) -> Tensor:
        """The original weight (N, K) float32 of a linear."""
        return self.taps[module].original.weight.detach().float()

    def run(
        self,
        hidden: Sequence[Tensor],
        frames: Sequence[Frame],
        at_group: AtGroup,
        *,
        keep: Keep,
        waiting: bool = True,
    ) -> None:
        """Send all batches through; `keep(i, output)` gets each one's output.

        `at_group(group, hessian)` is called once per group, when all batches have arrived there. A batch that
        is `waiting` for that holds its residual and the group's input and then goes on; where memory lacks,
        batches start again for every group, one at a time: the block is then run about twice.
        """
        self.gate.passed.clear()
        if waiting:
            self._run_waiting(hidden, frames, at_group, keep)
        else:
            self._run_again(hidden, frames, at_group, keep)

    def _run_waiting(
        self, hidden: Sequence[Tensor], frames: Sequence[Frame], at_group: AtGroup, keep: Keep
    ) -> None:
        lanes = [greenlet(self._lane(frame)) for frame in frames]
        answers = [lane.switch(h) for lane, h in zip(lanes, hidden, strict=True)]
        for group in self.groups:
            at_group(group, self._collect(group, answers))
            self.gate.passed.add(group.name)
            answers.clear()  # or every lane's last input would be kept until all lanes have moved on
            if group is not self.groups[-1]:
                answers = [lane.switch() for lane in lanes]
        while lanes:
            keep(len(frames) - len(lanes), lanes.pop(0).switch())

    def _run_again(
        self, hidden: Sequence[Tensor], frames: Sequence[Frame], at_group: AtGroup, keep: Keep
    ) -> None:
        for group in self.groups:
            at_group(group, self._collect(group, self._arrivals(hidden, frames)))
            self.gate.passed.add(group.name)
        self.forward(hidden, frames, keep)

    def forward(self, hidden: Sequence[Tensor], frames: Sequence[Frame], keep: Keep) -> None:
        """Send all batches through with the weights as they are, stopping nowhere."""
        self.gate.passed.update(group.name for group in self.groups)
        for i, frame in enumerate(frames):
            keep(i, self._lane(frame)(hidden[i]))

    def _collect(self, group: LinearGroup, answers: Iterable[tuple[LinearGroup, Tensor]]) -> Hessian:
        """The Hessian over all lanes' inputs."""
        weight = self.taps[group.modules[0]].original.weight
        hessian = Hessian(weight.shape[1], weight.device)
        for arrived, x in answers:
            if arrived.name != group.name:
                raise RuntimeError(f"the block runs {arrived.name} where the table says {group.name}")
            hessian.add(x)
        return hessian

    def _arrivals(
        self, hidden: Sequence[Tensor], frames: Sequence[Frame]
    ) -> Iterator[tuple[LinearGroup, Tensor]]:
        """What each batch brings to the next group, one at a time."""
        for i, frame in enumerate(frames):
            lane = greenlet(self._lane(frame))
            yield lane.switch(hidden[i])
            lane.throw()  # its frames, and what they hold, are given up

    def _lane(self, frame: Frame) -> Callable[[Tensor], Tensor]:
        def forward(hidden: Tensor) -> Tensor:
            out = self.block(hidden, **frame)
            first: Tensor = out[0] if isinstance(out, tuple) else out
            return first

        return forward


def _set(block: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(block.get_submodule(parent), leaf, module)
