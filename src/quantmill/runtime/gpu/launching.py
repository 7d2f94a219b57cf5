"""How the decoder's kernels are launched. Knows no kernel."""

from __future__ import annotations

import os

import torch

from quantmill.kernels.triton.linear import can_start_early


def power_of_two(n: int) -> int:
    """The least that is not below n."""
    return 1 << (n - 1).bit_length()


def launch(early: bool) -> dict[str, bool]:
    """Options of a launch that may begin while the kernel before it runs."""
    return {"launch_pdl": True} if early else {}


def starts_early(device: torch.device) -> bool:
    """Whether launches there can: by the GPU, and not in Triton's interpreter."""
    return can_start_early(device) and os.environ.get("TRITON_INTERPRET", "0") != "1"
