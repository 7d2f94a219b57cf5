"""How the decoder's kernels are launched. Knows no kernel."""

from __future__ import annotations

import os

import torch

from quantmill.kernels.triton.linear import can_start_early


def power_of_two(n: int) -> int:
    """The least that is not below n."""
    return 1 << (n - 1).bit_length()


def launch(early: bool, registers: int = 0) -> dict[str, int]:
    """Options of a launch that may begin while the kernel before it runs. registers: most of a thread; 0: any."""
    if not early:
        return {}
    return {"launch_pdl": True, "maxnreg": registers} if registers else {"launch_pdl": True}


def starts_early(device: torch.device) -> bool:
    """Whether launches there can: by the GPU, and not in Triton's interpreter."""
    return can_start_early(device) and os.environ.get("TRITON_INTERPRET", "0") != "1"
