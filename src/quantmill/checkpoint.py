"""A model folder: open and verify it, read its tensors, write its weights, show it to Transformers.

Opening reads headers and JSON only, loads no torch, and refuses what is incomplete or contradicts itself.
Folders of the AutoGPTQ era and of today. Knows no network and no model code.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmill.errors import BadCheckpoint, SourceNotFound, UnsupportedModel
from quantmill.files import atomic_folder, cache_root, read_json, write_json
from quantmill.formats.config import config_from_json, config_to_json, module_config
from quantmill.formats.container import TensorInfo, read_header, write_file
from quantmill.formats.dialects import Layout, as_gptq, layout_of, method
from quantmill.packed import SUFFIXES, Module, g_idx_of, module_faults, module_names, module_size, read_module
from quantmill.types import Json, PackedLinear, QuantConfig
from quantmill.weights import INDEX, WEIGHTS, find_weights, save_tensors, shard_name, write_index

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = [
    "Checkpoint",
    "TensorInfo",
    "atomic_folder",
    "modern_view",
    "open_checkpoint",
    "save_tensors",
    "write_json",
]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened model folder: its JSON, and where every tensor lies."""

    folder: Path
    config: Json  # config.json
    quant: Json | None  # the quantisation keys: config.json's, else quantize_config.json's
    tensors: dict[str, TensorInfo]
    _open_files: dict[Path, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def quant_config(self) -> QuantConfig:
        """The parameter set. Raises BadCheckpoint if there is none, UnsupportedModel if not GPTQ's."""
        if self.quant is None:
            raise BadCheckpoint(
                f"{self.folder} has no quantization_config: type `quantmill quantize {self.folder} --out DIR`"
            )
        return config_from_json(self.quant)

    @property
    def files(self) -> tuple[Path, ...]:
        """The weight files, in order."""
        return tuple(dict.fromkeys(info.file for info in self.tensors.values()))

    def load(self, name: str) -> Tensor:
        """One tensor, memory-mapped. Raises BadCheckpoint for a name that no file has."""
        from safetensors import SafetensorError, safe_open

        file = self._info(name).file
        try:
            if file not in self._open_files:
                self._open_files[file] = safe_open(file, framework="pt")
            tensor: Tensor = self._open_files[file].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise BadCheckpoint(f"{file}: {name} cannot be read ({error}): download it again") from error
        return tensor

    @property
    def layout(self) -> Layout:
        """How quantised linears lie in the files. Raises UnsupportedModel for a method that is not read."""
        return layout_of(self.quant or {})

    def module_config(self, module: str) -> QuantConfig:
        """The parameters of one module, which `dynamic` and its like may set apart. Raises as quant_config."""
        if self.quant is None:
            return self.quant_config
        return module_config(self.quant, module)

    def quantized_modules(self) -> tuple[str, ...]:
        """Names of the modules that hold packed weights, in the order of the files."""
        return module_names(self._layout_or_gptq(), self.tensors)

    def module_size(self, module: str) -> tuple[int, int]:
        """(in_features, out_features) of a quantised module, from the headers alone."""
        return module_size(self.layout, self._module(module))

    def module_faults(self, module: str) -> list[str]:
        """What the headers say against a module's tensors: suffix, found, and what the config asks for."""
        return module_faults(self.layout, self._module(module))

    def packed(self, module: str, send: Callable[[Tensor], Tensor] | None = None) -> PackedLinear:
        """A quantised module of any layout; zero convention told from the zeros, a missing `g_idx` filled in.

        send: moves every tensor to another device as soon as it is loaded, so that it is checked there.
        Raises BadCheckpoint where a tensor is missing, has another shape or dtype than the config asks for,
        or holds scales or a bias that overflow float16.
        """
        if faults := self.module_faults(module):
            raise BadCheckpoint(f"{module}: {faults[0]}: run `quantmill check {self.folder}`")
        found = self._module(module)
        if send is not None:
            found = replace(found, load=lambda suffix: send(self.load(f"{module}.{suffix}")))
        return read_module(self.layout, found)

    def _layout_or_gptq(self) -> Layout:
        """Of a folder whose method is not read, tensors are looked for under GPTQ's names."""
        try:
            return self.layout
        except UnsupportedModel:
            return Layout.GPTQ

    def _module(self, module: str) -> Module:
        start = f"{module}."
        held = {s: self.tensors[start + s] for s in SUFFIXES if start + s in self.tensors}
        return Module(module, self.module_config(module), held, lambda suffix: self.load(start + suffix))

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise BadCheckpoint(f"{self.folder} has no tensor {name}: run `quantmill check {self.folder}`")
        return self.tensors[name]


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a Transformers folder, quantised or not, reading JSON and headers only.

    Raises SourceNotFound for a path that is no folder, and BadCheckpoint, in one line, for JSON that cannot
    be read, a missing or damaged weight file, an index that names what is not there, and pickled weights.
    """
    if not folder.is_dir():
        raise SourceNotFound(f"{folder} is no folder: give a folder with config.json and *.safetensors")
    config = read_json(folder / "config.json")
    quant = config.get("quantization_config")
    if quant is None and (folder / "quantize_config.json").is_file():
        quant = read_json(folder / "quantize_config.json")
    if quant is not None and not isinstance(quant, dict):
        raise BadCheckpoint(f"{folder}/config.json: quantization_config is no JSON object: correct it")
    files, indexed = find_weights(folder, quant or {})
    return Checkpoint(folder, config, quant, _read_headers(folder, files, indexed))


def _read_headers(folder: Path, files: list[Path], indexed: list[str]) -> dict[str, TensorInfo]:
    """Every tensor of the files; all of `indexed` are among them, and none comes twice."""
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in read_header(file).items():
            if name in tensors:
                both = f"{tensors[name].file.name} and {file.name}"
                raise BadCheckpoint(f"{folder}: tensor {name} lies in {both}: keep one set of weight files")
            tensors[name] = info
    missing = [name for name in indexed if name not in tensors]
    if missing:
        lost = f"{len(missing)} tensors that no file has, first {missing[0]}"
        raise BadCheckpoint(f"{folder}: the index names {lost}: download the model again")
    return tensors


def modern_view(folder: Path, cache: Path | None = None) -> Path:
    """The folder itself where Transformers finds everything in it, else a cached folder of links that has it.

    What can be missing in old folders: the standard names of weight files, `quantization_config` in
    config.json or keys of it, a truthful `checkpoint_format`, and `g_idx`. Raises as open_checkpoint does.
    """
    checkpoint = open_checkpoint(folder)
    quant = _modern_quant(checkpoint)
    lacking = _lacking_g_idx(checkpoint)
    named = any((folder / name).is_file() for name in (WEIGHTS, INDEX))
    if named and not lacking and quant == checkpoint.config.get("quantization_config"):
        return folder
    config = checkpoint.config | ({"quantization_config": quant} if quant else {})
    view = cache_root(cache) / "views" / _view_name(checkpoint, config)
    if not view.is_dir():
        with atomic_folder(view) as new:
            _link(checkpoint, new, lacking)
            write_json(new / "config.json", config)
    return view


def _view_name(checkpoint: Checkpoint, config: Json) -> str:
    """Changes whenever a file of the folder does."""
    folder = checkpoint.folder.resolve()
    stats = [
        (p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.iterdir()) if p.is_file()
    ]
    text = json.dumps([str(folder), stats, config], sort_keys=True)
    return f"{folder.name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _is_gptq(checkpoint: Checkpoint) -> bool:
    if checkpoint.quant is None or method(checkpoint.quant) not in ("gptq", "auto-round", "intel/auto-round"):
        return False
    return checkpoint.layout is Layout.GPTQ and bool(checkpoint.quantized_modules())


def _modern_quant(checkpoint: Checkpoint) -> Json | None:
    """What config.json's quantization_config should say; unchanged where it says enough and the truth."""
    stated: Json | None = checkpoint.config.get("quantization_config")
    if checkpoint.quant is None or not _is_gptq(checkpoint):
        return stated
    config = checkpoint.quant_config
    probed = checkpoint.packed(checkpoint.quantized_modules()[0]).checkpoint_format
    named = {"quant_method", "bits", "group_size"}
    if stated and stated.keys() >= named and method(stated) == "gptq" and probed is config.zero_format:
        return stated
    kept = {
        k: v
        for k, v in as_gptq(checkpoint.quant).items()
        if v is not None and k not in ("checkpoint_format", "format")
    }
    return config_to_json(replace(config, checkpoint_format=probed)) | kept


def _lacking_g_idx(checkpoint: Checkpoint) -> tuple[str, ...]:
    if not _is_gptq(checkpoint):
        return ()
    return tuple(m for m in checkpoint.quantized_modules() if f"{m}.g_idx" not in checkpoint.tensors)


def _link(checkpoint: Checkpoint, view: Path, lacking: tuple[str, ...]) -> None:
    """Links under the names Transformers looks for, and a small file with the g_idx that were missing."""
    for file in checkpoint.folder.iterdir():
        if file.is_file() and ".safetensors" not in file.name and file.name != "config.json":
            (view / file.name).symlink_to(file.resolve())
    count = len(checkpoint.files) + bool(lacking)
    names = {f: WEIGHTS if count == 1 else shard_name(i, count) for i, f in enumerate(checkpoint.files)}
    for file, name in names.items():
        (view / name).symlink_to(file.resolve())
    if count == 1:
        return
    weight_map = {tensor: names[info.file] for tensor, info in checkpoint.tensors.items()}
    if lacking:
        extra = {f"{m}.g_idx": g_idx_of(checkpoint._module(m), checkpoint.module_size(m)[0]) for m in lacking}
        write_file(view / shard_name(count - 1, count), extra)
        weight_map |= dict.fromkeys(extra, shard_name(count - 1, count))
    write_index(view, weight_map, sum(info.nbytes for info in checkpoint.tensors.values()))
