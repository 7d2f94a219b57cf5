"""Ways to add up a tensor over the ranks of a model, each of them torch.distributed's. Knows no model.

All ranks have to call the same way in the same order; all get the same bits.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed
from torch import Tensor

dist: Any = torch.distributed  # its groups and stores are not in its type hints
ROOM = 1 << 23  # bytes of a part that `OneShot` takes: 256 rows of 8192 float32
ALIGNED = 16  # bytes, of which its parts are a multiple


class Sums(Protocol):
    """One way."""

    def takes(self, part: Tensor) -> bool:
        """Whether this way serves such a tensor: alike on all ranks for parts of one shape and type."""

    def add_up(self, part: Tensor) -> Tensor:
        """The sum of all ranks' `part`: in its place, or a new float tensor of its shape. Raises RuntimeError."""


class OnHost:
    """Through gloo, on the processor; a GPU's tensor is copied there and back. Takes everything."""

    def __init__(self, gloo: Any, size: int) -> None:
        self._gloo, self._size = gloo, size

    def takes(self, part: Tensor) -> bool:
        return True

    def add_up(self, part: Tensor) -> Tensor:
        if part.device.type == "cpu":
            self._add(part)
        else:
            here = part.float().cpu()
            self._add(here)
            part.copy_(here)
        return part

    def _add(self, part: Tensor) -> None:
        """More than two are added in the order of their ranks: gloo's own order depends on an element's place."""
        if self._size <= 2:
            self._gloo.allreduce([part]).wait()
            return
        parts = [torch.empty_like(part) for _ in range(self._size)]
        self._gloo.allgather([parts], [part]).wait()
        torch.add(parts[0], parts[1], out=part)
        for other in parts[2:]:
            part.add_(other)


class Nccl:
    """NCCL, on the current stream, so that a graph can capture it. Takes everything on a GPU."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self._group = dist.ProcessGroupNCCL(store, rank, size, dist.ProcessGroupNCCL.Options())
        # The first sum connects, which cannot be done while a graph is captured.
        self.add_up(torch.zeros(1, device="cuda"))
        torch.cuda.synchronize()

    def takes(self, part: Tensor) -> bool:
        return part.device.type == "cuda"

    def add_up(self, part: Tensor) -> Tensor:
        options = dist.AllreduceOptions()
        options.asyncOp = False
        work = self._group.allreduce([part], options)
        if work is not None:
            work.wait()
        return part


class OneShot:
    """torch's symmetric memory: one kernel reads all ranks' parts where they lie and adds them, in float32.

    Fewer steps than NCCL takes, for parts up to ROOM bytes, on GPUs that can read each other's memory; float16
    has no such kernel, so the sum is float32. Without NVLink multicast.
    """

    def __init__(self, store: Any, name: str, rank: int, size: int, device: torch.device) -> None:
        """name: of the group, new in every process. Raises RuntimeError where memory cannot be shared."""
        from torch._C import _distributed_c10d
        from torch.distributed import _symmetric_memory

        native: Any = _distributed_c10d
        symmetric: Any = _symmetric_memory  # both young, and not all in their type hints
        self._name = name
        self._room = symmetric.empty(ROOM, dtype=torch.uint8, device=device)
        # Torch 2.10 looks the name up in the one table, later ones in the other, which does not keep the group.
        symmetric._SymmetricMemory.set_group_info(name, rank, size, store)
        self._group = dist.ProcessGroup(store, rank, size)
        native._register_process_group(name, self._group)
        self._handle = symmetric._SymmetricMemory.rendezvous(self._room, name)
        self._sum = torch.ops.symm_mem.one_shot_all_reduce_out

    def takes(self, part: Tensor) -> bool:
        size = part.numel() * torch.float32.itemsize
        return part.device.type == "cuda" and size <= ROOM and size % ALIGNED == 0

    def add_up(self, part: Tensor) -> Tensor:
        box = self._room[: part.numel() * torch.float32.itemsize].view(torch.float32).view(part.shape)
        box.copy_(part)
        total: Tensor = self._sum(box, "sum", self._name, torch.empty_like(box))
        return total
