"""A variant's hidden states between two blocks: batches of tokens, on the device or in pinned host memory.

On a GPU they are kept in float16, every batch with a power of two that keeps its largest value in range:
half the room, and finer than the bfloat16 most models were trained in. A block always gets float32. What
waits in host memory is fetched one batch ahead, beside the work on the batch before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

LARGEST = 32768.0  # values are kept below this; float16 ends at 65504


class States(Sequence[Tensor]):
    """Batches (B, L, hidden): float32 on `device` when read; how they are kept is decided here.

    `on_host` matters on a GPU only. Reading batch i starts to fetch batch i + 1.
    """

    def __init__(self, batches: Iterable[Tensor], device: torch.device, *, on_host: bool = False) -> None:
        self.device = device
        self._kept: list[_Kept] = []
        kind = _Plain if device.type != "cuda" else _OnHost if on_host else _OnDevice
        self._side = torch.cuda.Stream(device) if kind is _OnHost else None  # type: ignore[no-untyped-call]
        for batch in batches:
            self._kept.append(kind(batch, self._side))
        self.shapes = [(kept.value.shape[0], kept.value.shape[1]) for kept in self._kept]

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]  # no slices
        batch = self._kept[index].read()
        if index + 1 < len(self._kept):
            self._kept[index + 1].fetch()
        return batch

    def __setitem__(self, index: int, batch: Tensor) -> None:
        self._kept[index].write(batch)

    @property
    def rows(self) -> int:
        """Token rows of all batches."""
        return sum(rows for rows, _ in self.shapes)

    def release(self) -> None:
        """Give the memory back; shapes stay known."""
        self._kept.clear()
        if self._side is not None:
            torch._C._host_emptyCache()  # torch would keep pinned memory for the next who asks


class _Kept:
    """One batch; the base keeps it as it is."""

    value: Tensor

    def __init__(self, batch: Tensor, side: torch.cuda.Stream | None) -> None:
        self.side = side
        self.write(batch)

    def write(self, batch: Tensor) -> None:
        self.value = batch

    def read(self) -> Tensor:
        return self.value

    def fetch(self) -> None:
        """Begin to bring it to the device."""


class _Plain(_Kept):
    """As it is, float32."""


class _OnDevice(_Kept):
    """Float16 with a power of two, on the device."""

    def write(self, batch: Tensor) -> None:
        self.value, self.scale = halve(batch)

    def read(self) -> Tensor:
        return self.value.float() * self.scale


class _OnHost(_Kept):
    """Float16 with a power of two, in pinned host memory."""

    def __init__(self, batch: Tensor, side: torch.cuda.Stream | None) -> None:
        self.value = torch.empty(batch.shape, dtype=torch.float16, pin_memory=True)
        self.coming: Tensor | None = None
        super().__init__(batch, side)

    def write(self, batch: Tensor) -> None:
        half, self.scale = halve(batch)
        self.value.copy_(half, non_blocking=True)
        self.written = torch.cuda.current_stream().record_event()

    def fetch(self) -> None:
        assert self.side is not None
        if self.coming is None:
            self.side.wait_event(self.written)
            with torch.cuda.stream(self.side):
                self.coming = self.value.to(self.scale.device, non_blocking=True)

    def read(self) -> Tensor:
        self.fetch()
        assert self.side is not None
        assert self.coming is not None
        now, self.coming = self.coming, None
        torch.cuda.current_stream().wait_stream(self.side)
        now.record_stream(torch.cuda.current_stream())
        return now.float() * self.scale


def halve(batch: Tensor) -> tuple[Tensor, Tensor]:
    """(values float16, scale float32 scalar) with batch = values * scale, the scale a power of two, 1 as a rule."""
    over = (batch.abs().amax() / LARGEST).clamp_min(1.0)
    scale = torch.exp2(torch.ceil(torch.log2(over)))
    return (batch / scale).half(), scale
