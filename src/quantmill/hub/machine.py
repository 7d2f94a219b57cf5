"""What this machine can hold: memory, and the memory of its GPU. Imports torch only to ask for the GPU."""

from __future__ import annotations

from dataclasses import dataclass

OVERHEAD = 1.1  # of the weights: buffers and activations of a short conversation
SPARE = 500_000_000  # bytes: the interpreter, the libraries, a cache of some thousand tokens


@dataclass(frozen=True, slots=True)
class Machine:
    """Memory in bytes; `vram` None without a GPU."""

    ram: int
    vram: int | None

    def fits(self, weights: int) -> str:
        """`GPU`, `RAM` or `no` for a model whose weight files have that many bytes."""
        need = weights * OVERHEAD + SPARE
        if self.vram is not None and need <= self.vram:
            return "GPU"
        return "RAM" if need <= self.ram else "no"


def this_machine() -> Machine:
    """The memory of this machine, and of the first GPU that torch can use."""
    import psutil
    import torch

    vram = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    return Machine(int(psutil.virtual_memory().total), vram)
