"""How much memory this process could still take: the machine's, or what its container leaves. Loads no torch."""

from __future__ import annotations

from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def free_memory() -> int:
    """Bytes of main memory that are free for this process."""
    import psutil

    free = int(psutil.virtual_memory().available)
    group = _cgroup_free()
    return free if group is None else min(free, group)


def _cgroup_free() -> int | None:
    """What a container's limit leaves (cgroup v2); None where there is no limit to read.

    psutil reports the host's memory, of which a container may own a small part.
    """
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return None
    return max(0, int(limit) - used) if limit.isdigit() else None
