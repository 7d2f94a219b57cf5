"""Files and folders that appear whole or not at all. Knows nothing of what is in them.

Everything is flushed to the disk before it gets its name, so a power cut leaves the old state or the new one.
POSIX only.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quantmill.errors import BadCheckpoint, BadRequest
from quantmill.types import Json

UNFINISHED = "partial"  # being written: worthless once its writer is dead
REPLACED = "replaced"  # the older folder, for the moment between two renames
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
HOLDS = ("config.json", "quantize_report.json", "README.md")  # one of them is in every folder that we replace


def read_json(path: Path) -> Json:
    """A JSON object. Raises BadCheckpoint where the file is missing or holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadCheckpoint(f"{path.parent} has no {path.name}: download the model again") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{path} cannot be read ({error}): correct it or download it again") from None
    if not isinstance(value, dict):
        raise BadCheckpoint(f"{path} is no JSON object: correct it or download it again")
    return value


def write_json(path: Path, value: object) -> None:
    """Write JSON (indent 2, UTF-8, a newline at the end); a reader sees the old file or the new one."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text; a reader sees the old file or the new one."""
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}.{UNFINISHED}")
    try:
        with unfinished.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    fsync(path.parent)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yields a new folder beside `target`, which takes that name if the body ends well and vanishes if not.

    An older `target` is replaced. What killed writers left behind is cleaned up first; a writer that still
    lives, as its lock tells, is left alone. Raises BadRequest where `target` is a file or holds other things.
    """
    target = Path(os.path.realpath(target))
    _refuse_foreign(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    _clean(target)
    folder = _beside(target, UNFINISHED)
    folder.mkdir()
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder
        _fsync_tree(folder)
        _swap(folder, target)
    except OSError as error:
        if error.errno in FULL and error.filename is None:  # an open file's write does not know its name
            error.filename = str(target)
        raise
    finally:
        os.close(lock)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def full_disk_said(path: Path) -> Iterator[None]:
    """Around what writes `path`: a full disk told in words alone, or not where, becomes OSError with both."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else 0
        short = number is None  # numpy: "9 requested and 5 written"
        if short or f"os error {errno.ENOSPC}" in str(error):
            number = errno.ENOSPC
        if number not in FULL:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def remove_folder(folder: Path) -> None:
    """Take a folder away: it loses its name at once, its content after that."""
    folder = Path(os.path.realpath(folder))
    gone = _beside(folder, UNFINISHED)
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def cache_root(cache: Path | None = None) -> Path:
    """Where quantmill keeps what it can make again: as told, $QUANTMILL_HOME, or the user's cache folder."""
    if cache is not None:
        return cache
    if home := os.environ.get("QUANTMILL_HOME"):
        return Path(home).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "quantmill"


def fsync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refuse_foreign(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise BadRequest(f"{target} is a file; a folder is to be written there: give another name")
    if target.is_dir() and any(target.iterdir()) and not any((target / name).exists() for name in HOLDS):
        raise BadRequest(f"{target} holds other things than a model and would be replaced: give a new folder")


def _beside(target: Path, state: str) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.{state}")


def _left(target: Path, state: str) -> list[Path]:
    """Folders in `state` that belong to `target`."""
    start, end = f".{target.name}.", f".{state}"
    token = 8
    length = len(start) + token + len(end)
    names = (p for p in target.parent.iterdir() if len(p.name) == length)
    return [p for p in names if p.name.startswith(start) and p.name.endswith(end) and p.is_dir()]


def _clean(target: Path) -> None:
    for older in _left(target, REPLACED):
        if target.exists():
            shutil.rmtree(older, ignore_errors=True)
        else:  # killed between the two renames of _swap
            older.rename(target)
    for folder in _left(target, UNFINISHED):
        if not _locked(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _locked(folder: Path) -> bool:
    """Whether a living writer holds the folder. The kernel drops the lock of a killed one."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _swap(folder: Path, target: Path) -> None:
    """Give `folder` the name `target`, and remove what had it."""
    older = _beside(target, REPLACED)
    if target.exists():
        target.rename(older)
    folder.rename(target)
    fsync(target.parent)
    shutil.rmtree(older, ignore_errors=True)


def _fsync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root) / name
            if not path.is_symlink():
                fsync(path)
        fsync(Path(root))
