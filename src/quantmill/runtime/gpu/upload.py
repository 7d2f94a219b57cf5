"""Mapped tensors -> the GPU as fast as the file can be read: through pinned buffers, two on their way at once."""

from __future__ import annotations

import torch
from torch import Tensor

BUFFER = 32 << 20  # bytes of one pinned buffer
SMALL = 1 << 20  # what is smaller goes the ordinary way


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
