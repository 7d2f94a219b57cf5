"""Tensors of a file -> the GPU as fast as the file can be read. Knows no model.

`Uploader` takes mapped tensors through two pinned buffers, one after the other. `EarlyUploader` is told what will
be asked for soon: threads read it into pinned buffers (to map a page costs more than to copy it), the GPU fetches
it from there, while the layers before are laid out.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import torch
from torch import Tensor

BUFFER = 32 << 20  # bytes of one of two pinned buffers
SMALL = 1 << 20  # what is smaller goes the ordinary way
PIECE = 8 << 20  # bytes of one of many
THREADS = 6


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor that is mapped from a file, contiguous, and where it begins there, in bytes."""

    mapped: Tensor
    file: Path
    begin: int


class Uploader:
    """Copies to one device. The copies to a buffer are made by all cores, those from it by the GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: list[Tensor] = []
        self._through: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        """The tensor on the device, in its own dtype and shape; itself where it is there."""
        if tensor.device.type == self._device.type:
            return tensor
        if self._device.type != "cuda" or tensor.numel() * tensor.element_size() < SMALL:
            return tensor.to(self._device)
        there = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
        source, target = (t.contiguous().view(-1).view(torch.uint8) for t in (tensor, there))
        for part, goal in zip(torch.split(source, BUFFER), torch.split(target, BUFFER), strict=True):
            self._send(part, goal)
        return there

    def ahead(self, tensors: Iterable[Stored]) -> None:
        """What will be asked for soon: nothing is done before it is."""

    def close(self) -> None:
        """Let the buffers go."""
        self._buffers.clear()

    def _send(self, part: Tensor, goal: Tensor) -> None:
        if not self._buffers:
            self._buffers = [torch.empty(BUFFER, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._turn ^= 1
        event = self._through[self._turn]
        if event is not None:
            event.synchronize()
        buffer = self._buffers[self._turn][: len(part)]
        buffer.copy_(part)
        goal.copy_(buffer, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._through[self._turn] = event


@dataclass(slots=True)
class _Buffer:
    """A pinned one."""

    bytes: Tensor
    through: torch.cuda.Event | None = None  # when it may be filled again


@dataclass(frozen=True, slots=True)
class _Coming:
    """A tensor on its way."""

    there: Tensor
    pieces: list[Future[torch.cuda.Event]]


class EarlyUploader(Uploader):
    """The same for a CUDA device, by some threads and a stream of its own. Close it."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        threads = min(THREADS, os.cpu_count() or 1)
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._free: SimpleQueue[_Buffer] = SimpleQueue()
        pinned = torch.empty((threads + 3) * PIECE, dtype=torch.uint8, pin_memory=True)
        for piece in torch.split(pinned, PIECE):
            self._free.put(_Buffer(piece))
        self._pool = ThreadPoolExecutor(threads, initializer=torch.cuda.set_stream, initargs=(self._side,))
        self._files: dict[Path, int] = {}
        self._coming: dict[tuple[int, int], _Coming] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        """See Uploader; what was begun by `ahead` is known by its place in memory."""
        coming = self._coming.pop(_place(tensor), None)
        if coming is None:
            return super().__call__(tensor)
        stream = torch.cuda.current_stream(self._device)
        for piece in coming.pieces:
            stream.wait_event(piece.result())
        return coming.there

    def ahead(self, tensors: Iterable[Stored]) -> None:
        """Begin to send what will be asked for soon."""
        for stored in tensors:
            place = _place(stored.mapped)
            if place not in self._coming and place[1] >= SMALL:
                self._coming[place] = self._begin(stored)

    def close(self) -> None:
        """Wait for what is on its way, and let threads, files and buffers go."""
        self._pool.shutdown()
        self._side.synchronize()
        self._coming.clear()
        for number in self._files.values():
            os.close(number)

    def _begin(self, stored: Stored) -> _Coming:
        there = torch.empty(stored.mapped.shape, dtype=stored.mapped.dtype, device=self._device)
        usable = torch.cuda.Event()  # type: ignore[no-untyped-call]  # once kernels are done with what lay there
        usable.record()
        if stored.file not in self._files:
            self._files[stored.file] = os.open(stored.file, os.O_RDONLY)
        file, goals = self._files[stored.file], torch.split(there.view(-1).view(torch.uint8), PIECE)
        begins = range(stored.begin, stored.begin + len(goals) * PIECE, PIECE)
        pieces = [
            self._pool.submit(self._piece, file, begin, goal, usable)
            for begin, goal in zip(begins, goals, strict=True)
        ]
        return _Coming(there, pieces)

    def _piece(self, file: int, begin: int, goal: Tensor, usable: torch.cuda.Event) -> torch.cuda.Event:
        """One piece, by a thread -> when it is there."""
        buffer = self._free.get()
        try:
            if buffer.through is not None:
                buffer.through.synchronize()
            with torch.inference_mode():  # as the tensors were made
                filled = buffer.bytes[: len(goal)]
                _read(file, begin, filled.numpy().data)
                self._side.wait_event(usable)
                goal.copy_(filled, non_blocking=True)
            buffer.through = torch.cuda.Event()  # type: ignore[no-untyped-call]
            buffer.through.record(self._side)
            return buffer.through
        finally:
            self._free.put(buffer)


def _read(file: int, begin: int, into: memoryview) -> None:
    """Fill it. Raises OSError where the file ends before."""
    done = 0
    while done < len(into):
        count = os.preadv(file, [into[done:]], begin + done)
        if not count:
            raise OSError("a weight file became shorter while it was read")
        done += count


def _place(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.numel() * tensor.element_size()
