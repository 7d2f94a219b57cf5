"""A model's linears in the CPU's layout, in one file that is mapped into memory. Made once per checkpoint.

The file's name is a hash of what it was made from: the JSON, every weight file's size, time of change and
samples of its bytes, and the options. So a changed checkpoint is packed anew and an unchanged one is never
read again. What a new file makes useless, or what has not been used for long, is removed when one is made.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from quantmill.errors import BadRequest
from quantmill.files import atomic_folder, cache_root, read_json, remove_folder, write_json
from quantmill.kernels.cpu.layout import CpuLinear
from quantmill.types import Json

if TYPE_CHECKING:
    from quantmill.checkpoint import Checkpoint

VERSION = 2  # of the layout: raise it whenever packing writes other bytes
ALIGNMENT = 64
INDEX, ARRAYS = "config.json", "arrays.bin"  # by the index's name files.py knows a folder it may replace
SAMPLES, SAMPLE_BYTES = 64, 4096
CAP = 64 << 30  # bytes of all stores together
UNUSED_DAYS = 90
_ARRAY_FIELDS = ("weights", "scales", "zeros", "first_slice", "columns", "bias")
_NUMBER_FIELDS = tuple(f.name for f in fields(CpuLinear) if f.name not in _ARRAY_FIELDS)


@dataclass(frozen=True, slots=True)
class Store:
    """Linears and other arrays by name; every array is a view of the mapped file."""

    linears: dict[str, CpuLinear]
    arrays: dict[str, NDArray[Any]]


def packed_store(checkpoint: Checkpoint, options: dict[str, int], cache: Path | None = None) -> Store:
    """The store of a checkpoint, made now if there is none. `options`: what `pack_model` depends on."""
    from quantmill.runtime.cpu.repack import pack_model

    folder = cache_root(cache) / "cpu" / _key(checkpoint, options)
    if not (folder / INDEX).exists():
        origin = {"source": str(checkpoint.folder.resolve()), "options": options}
        try:
            with atomic_folder(folder) as unfinished:
                with (unfinished / ARRAYS).open("wb") as stream:
                    index = write_arrays(stream, pack_model(checkpoint, options))
                write_json(unfinished / INDEX, {**origin, **index})
        except OSError as error:
            raise BadRequest(
                f"the packed weights cannot be written to {folder.parent} ({error}): make room there, or set "
                "QUANTMILL_HOME to another disk"
            ) from error
        prune(folder, origin)
    store = open_store(folder)
    with suppress(OSError):  # a cache that may only be read
        os.utime(folder / INDEX)
    return store


def prune(kept: Path, origin: Json) -> list[Path]:
    """Remove stores beside `kept`: older ones of the same origin, those unused for UNUSED_DAYS, and the longest
    unused until all together fit CAP. A process that has one mapped keeps it. Returns what was removed."""
    found = (p for p in kept.parent.iterdir() if p.name[0] != ".")  # those are being made, or removed
    others = sorted((p for p in found if p != kept and (p / INDEX).exists()), key=_used)
    total = sum(map(_size, [kept, *others]))
    removed = []
    for folder in others:
        index = read_json(folder / INDEX)
        superseded = all(index.get(key) == value for key, value in origin.items())
        if superseded or total > CAP or _used(folder) < time.time() - UNUSED_DAYS * 86400:
            total -= _size(folder)
            remove_folder(folder)
            removed.append(folder)
    return removed


def _used(folder: Path) -> float:
    return (folder / INDEX).stat().st_mtime


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.iterdir())


def open_store(folder: Path) -> Store:
    """Map a store's file. Raises BadCheckpoint where its index cannot be read."""
    index = read_json(folder / INDEX)
    data = np.memmap(folder / ARRAYS, np.uint8, mode="r")
    arrays = {name: _view(data, entry) for name, entry in index["arrays"].items()}
    linears = {}
    for name, numbers in index["linears"].items():
        parts: dict[str, Any] = {field: arrays.pop(f"{name}.{field}", None) for field in _ARRAY_FIELDS}
        linears[name] = CpuLinear(**parts, **numbers)
    return Store(linears, arrays)


def _view(data: NDArray[np.uint8], entry: dict[str, Any]) -> NDArray[Any]:
    begin, size = entry["offset"], entry["nbytes"]
    array: NDArray[Any] = data[begin : begin + size].view(np.dtype(entry["dtype"]))
    return array.reshape(entry["shape"])


def write_arrays(stream: BinaryIO, items: Iterator[tuple[str, CpuLinear | NDArray[Any]]]) -> dict[str, Any]:
    """Write arrays one after another; returns the index that `open_store` needs."""
    arrays: dict[str, Any] = {}
    linears: dict[str, Any] = {}

    def put(name: str, array: NDArray[Any]) -> None:
        stream.write(bytes(-stream.tell() % ALIGNMENT))
        entry = {"offset": stream.tell(), "nbytes": array.nbytes, "dtype": array.dtype.str}
        arrays[name] = {**entry, "shape": list(array.shape)}
        stream.write(np.ascontiguousarray(array).data)

    for name, item in items:
        if isinstance(item, CpuLinear):
            linears[name] = {field: getattr(item, field) for field in _NUMBER_FIELDS}
            for field in _ARRAY_FIELDS:
                if getattr(item, field) is not None:
                    put(f"{name}.{field}", getattr(item, field))
        else:
            put(name, item)
    return {"version": VERSION, "linears": linears, "arrays": arrays}


def _key(checkpoint: Checkpoint, options: dict[str, int]) -> str:
    digest = hashlib.sha256(json.dumps([VERSION, options, checkpoint.config, checkpoint.quant]).encode())
    for file in checkpoint.files:
        state = file.stat()
        digest.update(f"{file.name} {state.st_size} {state.st_mtime_ns}".encode())
        with file.open("rb") as stream:
            for i in range(SAMPLES):
                stream.seek(state.st_size * i // SAMPLES)
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()[:32]
