"""This process among those that run one model together: sums over torch.distributed, and who has left.

Ranks meet through a file in a private folder and talk over the loopback address, so that no port is open to
others. Sums of tensors on GPUs go through NCCL, into CUDA graphs too; on a processor, and where ranks share a GPU,
through gloo. Knows no model.
"""

from __future__ import annotations

import datetime
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from quantmill.errors import QuantmillError

dist: Any = torch.distributed  # its groups and stores are not in its type hints
MEET = datetime.timedelta(minutes=10)  # until all have read their weights
FILE = "meeting"
log = logging.getLogger(__name__)


class RankLost(QuantmillError):
    """A process of this model is gone."""


class Team:
    """One of `size` ranks. Every method but those of one rank is to be called by all, in the same order."""

    def __init__(self, folder: Path, rank: int, size: int, device: torch.device, *, nccl: bool) -> None:
        """folder: a private one that all ranks see. nccl: for sums of tensors on `device`, a GPU of its own."""
        self.rank, self.size, self.device = rank, size, device
        with self._told_of_loss():
            store = dist.FileStore(str(folder / FILE), size)
            self._talk = _gloo(dist.PrefixStore("talk", store), rank, size)
            self._nccl = _nccl(dist.PrefixStore("sums", store), rank, size) if nccl else None
            self._talk.barrier().wait()
        self._captured = self._nccl is not None and self._sums_in_graphs()

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def captured(self) -> bool:
        """Whether sums can be part of a CUDA graph."""
        return self._captured

    def add_up(self, part: Tensor) -> None:
        """The sum of all ranks' tensors in place of each; the same bits on all.

        Of two ranks, and through gloo of any number, an element's bits do not depend on what else is in the tensor.
        """
        with self._told_of_loss():
            if self._nccl is not None and part.device.type == "cuda":
                _nccl_sum(self._nccl, part)
            elif part.device.type == "cuda":
                here = part.float().cpu()
                self._add_here(here)
                part.copy_(here)
            else:
                self._add_here(part)

    def least(self, number: int) -> int:
        """The smallest of all ranks' numbers."""
        box = torch.tensor([number])
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MIN
        with self._told_of_loss():
            self._talk.allreduce([box], options).wait()
        return int(box)

    def total(self, numbers: list[float]) -> list[float]:
        """Sums over all ranks, one by one."""
        box = torch.tensor(numbers, dtype=torch.float64)
        with self._told_of_loss():
            self._add_here(box)
        return [float(n) for n in box]

    def _sums_in_graphs(self) -> bool:
        """Try it: a graph of one sum. Raises QuantmillError where NCCL does not add up at all."""
        box = torch.full((4096,), float(self.rank + 1), device=self.device)
        wanted = self.size * (self.size + 1) / 2
        self.add_up(box)
        if not bool((box == wanted).all()):
            raise QuantmillError("NCCL gives wrong sums between these GPUs: use --tensor-parallel 1")
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                _nccl_sum(self._nccl, box)
        except RuntimeError as error:
            log.warning("sums cannot be part of CUDA graphs here, so steps are slower: %s", error)
            self.least(0)
            return False
        if not self.least(1):
            return False
        box.fill_(self.rank + 1)
        graph.replay()
        return bool(self.least(int((box == wanted).all())))

    def _add_here(self, part: Tensor) -> None:
        """On the processor. More than two are added in the order of their ranks: gloo's own order depends on
        an element's place."""
        if self.size <= 2:
            self._talk.allreduce([part]).wait()
            return
        parts = [torch.empty_like(part) for _ in range(self.size)]
        self._talk.allgather([parts], [part]).wait()
        torch.add(parts[0], parts[1], out=part)
        for other in parts[2:]:
            part.add_(other)

    @contextmanager
    def _told_of_loss(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as e:  # torch.distributed raises subclasses of it, gloo the class itself
            reason = str(e).strip().splitlines()[0].partition(". ")[0][-100:]
            raise RankLost(
                f"rank {self.rank} of {self.size} lost another of this model's ranks ({reason}): start again"
            ) from e


def _gloo(store: Any, rank: int, size: int) -> Any:
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = MEET
    return dist.ProcessGroupGloo(store, rank, size, options)


def _nccl_sum(group: Any, part: Tensor) -> None:
    """On the current stream, so that a graph can capture it."""
    options = dist.AllreduceOptions()
    options.asyncOp = False
    work = group.allreduce([part], options)
    if work is not None:
        work.wait()


def _nccl(store: Any, rank: int, size: int) -> Any:
    group = dist.ProcessGroupNCCL(store, rank, size, dist.ProcessGroupNCCL.Options())
    # The first sum connects, which cannot be done while a graph is captured.
    _nccl_sum(group, torch.zeros(1, device="cuda"))
    torch.cuda.synchronize()
    return group
