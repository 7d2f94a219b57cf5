"""This process among those that run one model together: sums over torch.distributed, and who has left.

Ranks meet through a file in a private folder and talk over the loopback address, so that no port is open to
others. Sums of tensors on GPUs go through NCCL, into CUDA graphs too; on a processor, and where ranks share a GPU,
through gloo (sums.py). Knows no model.
"""

from __future__ import annotations

import datetime
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from quantmill.errors import QuantmillError, said_by
from quantmill.runtime.parallel.sums import Nccl, OneShot, OnHost, Sums

dist: Any = torch.distributed  # its groups and stores are not in its type hints
MEET = datetime.timedelta(minutes=10)  # until all have read their weights
FILE = "meeting"
SUMS = "QUANTMILL_SUMS"  # one-shot: small sums by torch's symmetric memory, which no two GPUs have tried yet
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
            self._ways: list[Sums] = [OnHost(self._talk, size)]
            if nccl:
                self._ways.insert(0, Nccl(dist.PrefixStore("sums", store), rank, size))
            if device.type == "cuda" and os.environ.get(SUMS) == "one-shot":
                self._prefer_memory(dist.PrefixStore("memory", store), str(folder))
            self._talk.barrier().wait()
        self._captured = len(self._ways) > 1 and self._sums_in_graphs()

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def captured(self) -> bool:
        """Whether sums can be part of a CUDA graph."""
        return self._captured

    def add_up(self, part: Tensor) -> Tensor:
        """The sum of all ranks' tensors, the same bits on all: in place of `part`, or another tensor on a GPU.

        Of two ranks, and through gloo of any number, an element's bits do not depend on what else is in the tensor.
        """
        with self._told_of_loss():
            return next(way for way in self._ways if way.takes(part)).add_up(part)

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
            self._ways[-1].add_up(box)
        return [float(n) for n in box]

    def _prefer_memory(self, store: Any, name: str) -> None:
        """Small sums by memory that all ranks see, where all ranks can."""
        try:
            way = OneShot(store, name, self.rank, self.size, self.device)
        except RuntimeError as error:
            log.warning("%s=one-shot is left out, memory cannot be shared here: %s", SUMS, error)
            self.least(0)
        else:
            if self.least(1):
                self._ways.insert(0, way)

    def _sums_in_graphs(self) -> bool:
        """Try it: a graph of one sum. Raises QuantmillError where these GPUs do not add up at all."""
        box = torch.full((4096,), float(self.rank + 1), device=self.device)
        wanted = self.size * (self.size + 1) / 2
        if not bool((self.add_up(box) == wanted).all()):
            raise QuantmillError("sums between these GPUs are wrong: use --tensor-parallel 1")
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                box.fill_(self.rank + 1)
                found = self.add_up(box)
        except (RuntimeError, RankLost) as error:
            log.warning("sums cannot be part of CUDA graphs here, so steps are slower: %s", error)
            self.least(0)
            return False
        if not self.least(1):
            return False
        graph.replay()
        return bool(self.least(int((found == wanted).all())))

    @contextmanager
    def _told_of_loss(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as e:  # torch.distributed raises subclasses of it, gloo the class itself
            raise RankLost(
                f"rank {self.rank} of {self.size} lost another of this model's ranks ({said_by(e)}): start again"
            ) from e


def _gloo(store: Any, rank: int, size: int) -> Any:
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = MEET
    return dist.ProcessGroupGloo(store, rank, size, options)
