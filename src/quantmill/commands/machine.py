"""The machine a command runs on: which device, how many threads."""

from __future__ import annotations

import re

import torch

from quantmill.errors import BadRequest


def pick_device(device: str) -> str:
    """`auto` becomes cuda where there is a GPU, else cpu. Raises BadRequest for a device that is not here."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.split(":")[0] not in ("cpu", "cuda"):
        raise BadRequest(f"there is no device {device!r}: use --device cpu, cuda or auto")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise BadRequest("there is no GPU that torch can use here: use --device cpu")
    return device


def memory_limit(typed: str | None, flag: str) -> int | None:
    """Bytes of a limit such as 16GB, 900MB or 12GiB; None without one. Raises BadRequest for anything else."""
    if typed is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)", typed.strip().upper())
    if not found or float(found[1]) <= 0:
        raise BadRequest(f"{flag} {typed!r} is no amount of memory: write 16GB, 900MB or 12GiB")
    unit = 1024.0 if "I" in found[2] else 1000.0
    return round(float(found[1]) * unit ** " KMG".index(found[2][0]))


def set_threads(threads: int | None) -> None:
    """Use that many CPU threads for torch and numba; None leaves the libraries' choice, one per core."""
    if threads is None:
        return
    from numba import config, set_num_threads

    torch.set_num_threads(threads)
    set_num_threads(min(threads, int(config.NUMBA_NUM_THREADS)))  # type: ignore[attr-defined]
