"""The sha256 of every file of a model folder, in a file that `sha256sum -c` reads. Knows no models.

Written by whoever makes a folder; whoever changes a file of it on purpose brings the list up to date.
"""

from __future__ import annotations

import hashlib
import mmap
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from quantmill.errors import BadCheckpoint
from quantmill.files import write_text

NAME = "SHA256SUMS"
AT_ONCE = 1 << 20  # bytes

_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


def files_of(folder: Path) -> dict[str, Path]:
    """Every file by its path in the folder, but none that begins with a dot or lies below such a folder."""
    found = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    return {
        n: p for n, p in found.items() if n != NAME and not any(part.startswith(".") for part in n.split("/"))
    }


def sha256_of(path: Path) -> str:
    """The sha256 of a file. It must not be cut meanwhile."""
    digest, size = hashlib.sha256(), path.stat().st_size
    if size:
        with (
            path.open("rb") as stream,
            mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as view,
        ):
            for begin in range(0, size, AT_ONCE):
                digest.update(view[begin : begin + AT_ONCE])
                if hasattr(mmap, "MADV_DONTNEED"):  # what was read need not stay in this process
                    mapped.madvise(mmap.MADV_DONTNEED, begin, min(AT_ONCE, size - begin))
    return digest.hexdigest()


def manifest_text(sums: Mapping[str, str]) -> str:
    """Path -> sha256 as the lines of a manifest, in the order of paths."""
    return "".join(f"{sums[path]}  {path}\n" for path in sorted(sums))


def write_manifest(folder: Path) -> None:
    """List every file that is in a folder now."""
    write_text(
        folder / NAME, manifest_text({name: sha256_of(path) for name, path in files_of(folder).items()})
    )


def read_manifest(folder: Path) -> dict[str, str] | None:
    """Path -> sha256, None where there is no manifest. Raises BadCheckpoint for one that is not understood."""
    path = folder / NAME
    if not path.is_file():
        return None
    sums = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        found = _LINE.fullmatch(line)
        if found is None:
            raise BadCheckpoint(f"{path}: {line[:60]!a} is no line of a list of hashes: remove the file")
        sums[found[2]] = found[1]
    return sums


def update_manifest(folder: Path, names: Iterable[str]) -> None:
    """Bring the lines of these files up to date where there is a manifest; one that is gone is not listed."""
    sums = read_manifest(folder)
    if sums is None:
        return
    for name in names:
        sums.pop(name, None)
        if (folder / name).is_file():
            sums[name] = sha256_of(folder / name)
    write_text(folder / NAME, manifest_text(sums))


def differing(sums: Mapping[str, str], found: Mapping[str, str]) -> tuple[str, ...]:
    """Files of a manifest that have another hash, or are not there."""
    return tuple(sorted(name for name, sha256 in sums.items() if found.get(name) != sha256))
