"""The safetensors container: read and verify a header, write a file. Knows no model and no quantisation.

A file is eight bytes (header length, little-endian), a JSON header, and the tensors' bytes without gaps, as
the safetensors project defines it. Reading touches the header alone; writing copies no tensor in main memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from quantmill.errors import BadCheckpoint
from quantmill.types import Json

if TYPE_CHECKING:
    from torch import Tensor

MAX_HEADER = 100_000_000  # what the safetensors library accepts, too
LFS_POINTER = b"version https://git-lfs"
CURE = "download it again"

DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
NAMES = {  # of the dtypes that are written, by the names torch gives them
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.int16": "I16",
    "torch.int8": "I8",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says of one tensor. `dtype` is safetensors' name: F16, BF16, I32, ..."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Every tensor of a safetensors file, in the order of their bytes.

    Raises BadCheckpoint for a file that is no safetensors, truncated, longer than it says, or whose tensors
    overlap, leave gaps or do not have the size of their shape.
    """
    with file.open("rb") as stream:
        header, data_bytes = _read_json(file, stream)
    header.pop("__metadata__", None)
    spans = sorted((_span(file, name, entry) for name, entry in header.items()), key=lambda s: (s[0], s[1]))
    end = 0
    for start, stop, name, _ in spans:
        if start != end:
            fault = "overlaps the tensor before it" if start < end else "leaves a gap before it"
            raise BadCheckpoint(f"{file}: tensor {name} {fault}: {CURE}")
        end = stop
    if end != data_bytes:
        what = "truncated" if data_bytes < end else "longer than its header says"
        raise BadCheckpoint(f"{file} is {what}: {data_bytes} bytes of tensors, {end} are needed: {CURE}")
    return {name: info for _, _, name, info in spans}


def begins(file: Path) -> dict[str, int]:
    """Where in a safetensors file each tensor's bytes begin. The file is one that `read_header` took."""
    with file.open("rb") as stream:
        header, data_bytes = _read_json(file, stream)
    header.pop("__metadata__", None)
    first = file.stat().st_size - data_bytes
    return {name: first + entry["data_offsets"][0] for name, entry in header.items()}


def map_tensors(file: Path) -> dict[str, Tensor]:
    """Every tensor of a file of dtypes that are written, on the CPU, each in a private mapping of its own.

    Memory that was read is given back when its tensor is dropped, whatever becomes of the others. Raises as
    read_header.
    """
    import numpy as np
    import torch

    dtypes = {stored: getattr(torch, name.removeprefix("torch.")) for name, stored in NAMES.items()}
    infos, first = read_header(file), begins(file)

    def one(name: str, info: TensorInfo) -> Tensor:
        dtype = dtypes[info.dtype]
        if not info.nbytes:
            return torch.empty(info.shape, dtype=dtype)
        mapped = np.memmap(file, np.uint8, "c", first[name], info.nbytes)
        return torch.from_numpy(mapped).view(dtype).reshape(info.shape)

    return {name: one(name, info) for name, info in infos.items()}


def write_file(
    file: Path, tensors: Mapping[str, Tensor], forget: Callable[[str], object] | None = None
) -> None:
    """Write tensors (on any device) and flush them to the disk. The same tensors give the same bytes.

    Widest elements come first, then names in order, which keeps every tensor aligned for memory mapping. `forget`
    is told the name of each tensor that was written and is not needed any more.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: Json = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": NAMES[str(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        ordered.reverse()
        while ordered:
            name, tensor = ordered.pop()
            stream.write(_raw(tensor))
            del tensor
            if forget:
                forget(name)
        stream.flush()
        os.fsync(stream.fileno())


def _raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, without a copy where it is contiguous and in main memory."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _read_json(file: Path, stream: BinaryIO) -> tuple[Json, int]:
    """The header and the number of bytes after it."""
    size = file.stat().st_size
    start = stream.read(len(LFS_POINTER))
    if start == LFS_POINTER:
        raise BadCheckpoint(f"{file} is a Git LFS pointer, not the weights: run `git lfs pull`")
    length = int.from_bytes(start[:8], "little")
    if size < 8 or not 2 <= length <= MAX_HEADER:
        raise BadCheckpoint(f"{file} is not a safetensors file ({size} bytes): {CURE}")
    if 8 + length > size:
        raise BadCheckpoint(f"{file} is truncated: {size} bytes, its header alone takes {8 + length}: {CURE}")
    stream.seek(8)
    try:
        header = json.loads(stream.read(length))
    except (ValueError, RecursionError):  # of the encoding, of the JSON, of its depth
        raise BadCheckpoint(f"{file} has a header that is no JSON: {CURE}") from None
    if not isinstance(header, dict):
        raise BadCheckpoint(f"{file} has a header that is no JSON object: {CURE}")
    return header, size - 8 - length


def _span(file: Path, name: str, entry: Any) -> tuple[int, int, str, TensorInfo]:
    """(first byte, byte after the last, name, info) of one entry of the header."""
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(stop)]}:
            pass
        case _:
            raise BadCheckpoint(f"{file}: the header's entry for {name} is malformed: {CURE}")
    if dtype not in DTYPE_BITS:
        raise BadCheckpoint(f"{file}: tensor {name} has the unknown dtype {dtype}: {CURE}")
    if not all(isinstance(n, int) and n >= 0 for n in shape):
        raise BadCheckpoint(f"{file}: tensor {name} has the senseless shape {shape}: {CURE}")
    needed = prod(shape) * DTYPE_BITS[dtype] // 8
    if start < 0 or stop - start != needed:
        raise BadCheckpoint(
            f"{file}: tensor {name} takes bytes {start} to {stop}, {needed} bytes are needed: {CURE}"
        )
    return start, stop, name, TensorInfo(file, dtype, tuple(shape), needed)
