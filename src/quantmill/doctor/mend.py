"""`check --fix`: a folder is mended in a copy of it (hard links), which then takes its name in one step.

    copy -> file names -> what a base model can give -> tensors -> the two configs -> paths -> hashes -> exchange

What was there stays beside it, under a name with a dot; where nothing changed, nothing is left. Every mend is
exact: no weight gets another value, though rows and columns may change places together. What cannot be mended so
stays a finding of `check`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from quantmill.doctor import mend_configs, mend_files, mend_tensors, private
from quantmill.errors import BadRequest, SourceNotFound
from quantmill.files import UNFINISHED, fsync
from quantmill.manifest import NAME as SUMS
from quantmill.manifest import files_of, update_manifest

BEFORE = "before-fix"  # .NAME.before-fix, and a number from the second on
_EXCHANGE, _HERE = 2, -100  # RENAME_EXCHANGE, AT_FDCWD


@dataclass(frozen=True, slots=True)
class Mended:
    """What was changed, a line each as `file: what`; where the folder as it was lies now (None: unchanged)."""

    notes: tuple[str, ...]
    backup: Path | None


# In this order: later ones need what earlier ones set right. Each changes the copy and says what it did.
MENDS: tuple[Callable[[Path, Path | None], Iterator[str]], ...] = (
    mend_files.weight_names,
    mend_files.paper_names,
    mend_files.companions,
    mend_configs.parameters,
    mend_tensors.tensors,
    mend_configs.labels,
    private.papers,
)


def fix(folder: Path, base: Path | None = None) -> Mended:
    """Mend what can be mended exactly. `base`: the original's folder, for files that are missing.

    Raises SourceNotFound, BadRequest (a shared cache), and BadCheckpoint and UnsupportedModel for a folder that
    cannot be opened.
    """
    if folder.is_file() and folder.suffix.lower() == ".gguf":
        raise BadRequest(f"{folder.name} is a .gguf file, which is not mended: make it or fetch it again")
    if not folder.is_dir():
        raise SourceNotFound(f"{folder} is no folder: give a folder with config.json and *.safetensors")
    folder = Path(os.path.realpath(folder))
    if any(path.is_symlink() for path in folder.iterdir()):
        raise BadRequest(
            f"{folder} lies in a shared cache, where others see it: quantmill download it with --local-dir first"
        )
    copy = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.{UNFINISHED}")
    try:
        _link_tree(folder, copy)
        notes = tuple(note for mend in MENDS for note in mend(copy, base))
        if not notes:
            return Mended((), None)
        _renew_hashes(folder, copy)
        for path in (*copy.rglob("*"), copy):
            if not path.is_symlink():
                fsync(path)
        backup = _backup_name(folder)
        _exchange(copy, folder, backup)
        return Mended(notes, backup)
    finally:
        shutil.rmtree(copy, ignore_errors=True)


def _link_tree(folder: Path, copy: Path) -> None:
    """A copy that shares its bytes: files are only ever replaced in it, never written into."""
    shutil.copytree(folder, copy, copy_function=_link, symlinks=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # no links here, or another's file
        shutil.copy2(source, target, follow_symlinks=False)


def _renew_hashes(folder: Path, copy: Path) -> None:
    """Bring the manifest up to date for what changed, and nothing else: other damage stays visible."""
    if not (copy / SUMS).is_file():
        return
    before, after = files_of(folder), files_of(copy)
    same = {n for n in before.keys() & after.keys() if os.path.samefile(before[n], after[n])}
    update_manifest(copy, sorted((before.keys() | after.keys()) - same))


def _backup_name(folder: Path) -> Path:
    number = 1
    while (found := folder.with_name(f".{folder.name}.{BEFORE}{number if number > 1 else ''}")).exists():
        number += 1
    return found


def _exchange(new: Path, folder: Path, backup: Path) -> None:
    """`new` takes the name `folder`, what had it becomes `backup`. One step where the kernel can do it."""
    libc = ctypes.CDLL(None, use_errno=True)
    with contextlib.suppress(AttributeError):  # a libc without it
        if libc.renameat2(_HERE, os.fsencode(new), _HERE, os.fsencode(folder), _EXCHANGE) == 0:
            new.rename(backup)
            fsync(folder.parent)
            return
    folder.rename(backup)
    new.rename(folder)
    fsync(folder.parent)
