"""Where a model folder keeps its weights: find the files, write them. Knows file names, not tensors' meaning.

Transformers' names for new folders; those of the AutoGPTQ era, and whatever is unambiguous, for old ones. No
pickle is ever opened.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from quantmill.errors import BadCheckpoint
from quantmill.files import fsync, read_json, write_json
from quantmill.formats.container import write_file
from quantmill.types import Json

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
SHARD_BYTES = 4_000_000_000
SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")


def save_tensors(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int = SHARD_BYTES
) -> None:
    """Write weights as `model.safetensors`, or as shards and an index, holding one shard at most in memory.

    Files get their names when all are complete; weight files of an earlier save are removed.
    """
    shards: list[tuple[Path, list[str], int]] = []
    pending: dict[str, Tensor] = {}
    seen: set[str] = set()
    size = 0

    def flush() -> None:
        file = folder / f".{len(shards):05}.safetensors.partial"
        names = sorted(pending)
        write_file(file, pending, forget=pending.pop)
        shards.append((file, names, size))

    for name, tensor in tensors:
        assert name not in seen, f"{name} came twice"
        seen.add(name)
        nbytes = tensor.numel() * tensor.element_size()
        if pending and size + nbytes > max_shard_bytes:
            flush()
            pending, size = {}, 0
        pending[name] = tensor
        size += nbytes
    flush()
    _name_shards(folder, shards)


def shard_name(number: int, count: int) -> str:
    """Transformers' name of shard `number` (from 0) of `count`."""
    return f"model-{number + 1:05}-of-{count:05}.safetensors"


def write_index(folder: Path, weight_map: dict[str, str], total: int) -> None:
    """The index beside shards: `weight_map` is tensor -> file name, `total` the bytes of all tensors."""
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX, index)


def find_weights(folder: Path, quant: Json) -> tuple[list[Path], list[str]]:
    """The safetensors files of a folder, and the tensors that its index promises (none without an index).

    The order of preference is Transformers'; then the name in the quantisation config, then what is unique.
    Raises BadCheckpoint where there are none, where files are missing, or where it is unclear which count.
    """
    base = quant.get("model_file_base_name")
    for stem in ("model", base) if isinstance(base, str) else ("model",):
        if (folder / f"{stem}.safetensors").is_file():
            return [folder / f"{stem}.safetensors"], []
        if (folder / f"{stem}.safetensors.index.json").is_file():
            return _indexed(folder / f"{stem}.safetensors.index.json")
    indexes = list(folder.glob("*.safetensors.index.json"))
    if len(indexes) == 1:
        return _indexed(indexes[0])
    files = sorted(folder.glob("*.safetensors"))
    if _one_set(files):
        return files, []
    raise BadCheckpoint(_no_weights(folder, files))


def _name_shards(folder: Path, shards: list[tuple[Path, list[str], int]]) -> None:
    """Give complete shards their final names, the index last."""
    stale = {*folder.glob("model-*-of-*.safetensors"), folder / WEIGHTS, folder / INDEX}
    stale |= {*folder.glob(".*.safetensors.partial")} - {file for file, _, _ in shards}  # of a killed save
    count = len(shards)
    names = [WEIGHTS] if count == 1 else [shard_name(i, count) for i in range(count)]
    for (file, _, _), name in zip(shards, names, strict=True):
        file.replace(folder / name)
    for file in stale - {folder / name for name in names}:
        file.unlink(missing_ok=True)
    if count > 1:
        weight_map = {
            tensor: name for (_, held, _), name in zip(shards, names, strict=True) for tensor in held
        }
        write_index(folder, weight_map, sum(size for _, _, size in shards))
    fsync(folder)


def _indexed(index: Path) -> tuple[list[Path], list[str]]:
    """The files that an index names, all of them present, and its tensors."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadCheckpoint(f"{index} has no weight_map: download it again")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise BadCheckpoint(
                f"{index} names {name!r}; a .safetensors file beside it is needed: correct it"
            )
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise BadCheckpoint(
            f"{index.parent}: {len(missing)} of {len(names)} weight files are missing, first {missing[0]}: "
            "download the rest"
        )
    return [index.parent / name for name in names], list(weight_map)


def _one_set(files: list[Path]) -> bool:
    """Whether the files, in order, are one whole file or shards 1 to n of n."""
    parts = [SHARD_NAME.fullmatch(file.name) for file in files]
    if len(files) == 1 and parts[0] is None:
        return True
    found = [(p["stem"], int(p["number"]), int(p["count"])) for p in parts if p]
    return bool(found) and found == [(found[0][0], i + 1, len(files)) for i in range(len(files))]


def _no_weights(folder: Path, files: list[Path]) -> str:
    if files:
        listed = ", ".join(f.name for f in files[:4])
        return (
            f"{folder}: unclear which weights are meant ({listed}): download what is missing, or keep one set"
        )
    pickled = sorted(f.name for f in folder.iterdir() if f.suffix in PICKLES)
    if pickled:
        return f"{folder} holds {pickled[0]}, a pickle, which quantmill never opens: get a safetensors branch"
    return f"{folder} has no *.safetensors: download the weights"
