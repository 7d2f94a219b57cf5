"""Several processes at one task, over torch.distributed: who does what, and what is exchanged.

    torchrun --nproc-per-node N -m quantmill quantize ...
    torchrun --nproc-per-node N -m quantmill eval ...

Batches of tokens are spread over the ranks, and their moments added up; every rank factors the same H and
solves its share of the rows (spread.py), which do not know of each other; codes and scales go to all. Rank 0
alone writes. Sums of floats in another order aside, the result is that of one process.
"""

from __future__ import annotations

import datetime
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantmill.errors import BadRequest, UserError, said_by
from quantmill.types import IntLinear

CURE = (
    "start again, with any number of processes; quantize has kept finished blocks and goes on with --resume"
)
PATIENCE = datetime.timedelta(minutes=30)  # rank 0 may write this long before others give it up


class RankLost(UserError):
    """A process of this run is gone."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those of the run: one of one, unless torchrun started it."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this one writes and speaks."""
        return self.rank == 0

    def mine(self, items: Sequence[Any]) -> list[Any]:
        """This rank's share of what comes in pieces; never empty while there are as many as ranks."""
        return list(items[self.rank :: self.size])

    def rows(self, count: int) -> slice:
        """This rank's share of `count` rows, consecutive."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def add_up(self, total: Tensor, tokens: int) -> int:
        """Add the other ranks' sums to `total`, in place, and their tokens to `tokens`."""
        if self.size == 1:
            return tokens
        import torch.distributed as dist

        count = torch.tensor([tokens], device=total.device)
        with _told_of_loss(self):
            dist.all_reduce(total)
            dist.all_reduce(count)
        return int(count)

    def total(self, sums: list[float]) -> list[float]:
        """All ranks' numbers added up, one by one: the same bits on all ranks."""
        if self.size == 1:
            return sums
        import torch.distributed as dist

        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        box = torch.tensor(sums, dtype=torch.float64, device=device)
        with _told_of_loss(self):
            dist.all_reduce(box)
        found: list[float] = box.tolist()
        return found

    def gather_rows(self, part: Tensor, count: int) -> Tensor:
        """The rows of all ranks, in order, of a tensor with `count` rows of which this rank has its share."""
        if self.size == 1:
            return part
        import torch.distributed as dist

        longest = -(-count // self.size)
        padded = torch.nn.functional.pad(part.contiguous(), (0, 0, 0, longest - len(part)))
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        with _told_of_loss(self):
            dist.all_gather(parts, padded)
        shares = [Ranks(r, self.size).rows(count) for r in range(self.size)]
        return torch.cat([p[: s.stop - s.start] for p, s in zip(parts, shares, strict=True)])

    def gather_linear(self, part: IntLinear, count: int) -> IntLinear:
        """A linear of which every rank has solved its share of `count` rows."""
        raw = part.scales.contiguous().view(torch.uint8)  # moved as bytes: not every back end has float16
        scales = self.gather_rows(raw, count).view(torch.float16)
        return IntLinear(
            self.gather_rows(part.codes, count), scales, self.gather_rows(part.zeros, count), part.g_idx
        )

    def agreed(self, value: Any) -> Any:
        """Rank 0's value, on all ranks."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        box = [value]
        with _told_of_loss(self):
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def gathered(self, value: Any) -> list[Any]:
        """All ranks' values, in their order, on all ranks."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        with _told_of_loss(self):
            dist.all_gather_object(values, value)
        return values

    def refuse_unless_alike(self, value: str, what: str) -> None:
        """Raises BadRequest where a rank was given something else than rank 0."""
        if self.agreed(value) != value:
            raise BadRequest(f"rank {self.rank} has other {what} than rank 0: start all ranks alike")


def join(device: str) -> Ranks:
    """The ranks that torchrun started, or this process alone. Takes its GPU, and waits for the others."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Ranks()
    import torch.distributed as dist

    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    ranks = Ranks(int(os.environ["RANK"]), size)
    if not dist.is_initialized():
        with _told_of_loss(ranks):
            dist.init_process_group({"cuda": "nccl"}.get(kind, "gloo"), timeout=PATIENCE)
    if ranks.first:
        _answer_sigterm(_told_to_end)
    return ranks


def _answer_sigterm(answer: Callable[[int, object], None] | signal.Handlers) -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, answer)


def _told_to_end(number: int, frame: object) -> None:
    """torchrun ends the others when one has died, as a rule before a sum can notice."""
    _answer_sigterm(signal.SIG_IGN)
    raise RankLost(f"rank 0 was told to end, as torchrun does when another rank has died: {CURE}")


def leave(ranks: Ranks) -> None:
    """Part from the others once all are done."""
    if ranks.size > 1:
        import torch.distributed as dist

        with _told_of_loss(ranks):
            dist.barrier()
        dist.destroy_process_group()
        if ranks.first:
            _answer_sigterm(signal.SIG_DFL)


@contextmanager
def _told_of_loss(ranks: Ranks) -> Iterator[None]:
    """What a back end raises when a process has died or does not answer, as an error for people."""
    try:
        yield
    except RuntimeError as e:  # torch.distributed raises subclasses of it, gloo the class itself
        _answer_sigterm(signal.SIG_IGN)  # this process ends by itself
        raise RankLost(f"rank {ranks.rank} of {ranks.size} lost the others ({said_by(e)}): {CURE}") from e
