"""Quantised folder -> GPTQ, AWQ or compressed-tensors folder: one row per container."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from quantmill import __version__, manifest
from quantmill.checkpoint import Checkpoint
from quantmill.errors import BadRequest, UnsupportedModel
from quantmill.files import atomic_folder, write_json
from quantmill.formats import awq, compressed
from quantmill.formats.dialects import is_mixed
from quantmill.formats.gptq import config_to_json, is_sequential, pack, unpack, unpack_zeros
from quantmill.packed import SUFFIXES
from quantmill.types import ActOrder, CheckpointFormat, Json, PackedLinear, QuantConfig
from quantmill.weights import save_tensors

Advance = Callable[[int, str], None]
# Written anew, or said of the files as they were.
NOT_COPIED = ("config.json", "quantize_config.json", manifest.NAME, "check_report.json")
WEIGHT_ENDINGS = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".gguf")


@dataclass(frozen=True, slots=True)
class FolderRow:
    """How a container's tensors and its config are written."""

    tensors: Callable[[PackedLinear, QuantConfig], dict[str, Tensor]]
    config: Callable[[QuantConfig, Checkpoint], Json]
    quantize_config: bool  # whether quantize_config.json lies beside config.json


def write_folder(
    checkpoint: Checkpoint, to: str, out: Path, advance: Advance
) -> tuple[Path, tuple[str, ...]]:
    """Write the folder `out`. Raises UnsupportedModel, naming the module that does not fit."""
    if out.resolve() == checkpoint.folder.resolve():
        raise BadRequest(f"{out} is the model itself: give another --out")
    if is_mixed(checkpoint.quant or {}):
        raise UnsupportedModel(
            f"{checkpoint.folder.name} has parameters per module: convert it to gguf instead"
        )
    row, config = FOLDERS[to], _config_of(checkpoint)
    with atomic_folder(out) as folder:
        save_tensors(folder, _tensors(checkpoint, row, config, advance))
        quant = row.config(config, checkpoint)
        kept = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
        write_json(folder / "config.json", kept | {"quantization_config": quant})
        if row.quantize_config:
            write_json(folder / "quantize_config.json", quant)
        copy_companions(checkpoint.folder, folder)
        manifest.write_manifest(folder)
    return out, _notes(checkpoint, to)


def copy_companions(source: Path, folder: Path) -> None:
    """Tokenizer, chat template, licence, reports: every file that is no weight and no config."""
    for file in sorted(source.iterdir()):
        skipped = file.name in NOT_COPIED or file.name.endswith(WEIGHT_ENDINGS) or file.name.startswith(".")
        if file.is_file() and not skipped:
            shutil.copyfile(file, folder / file.name)


def _config_of(checkpoint: Checkpoint) -> QuantConfig:
    """The folder's parameters, symmetric where every zero point is the middle one.

    AWQ and GGUF files have no such label, and some readers of the others take symmetric files only.
    """
    config = checkpoint.quant_config
    middle = all(_is_middle(checkpoint.packed(m)) for m in checkpoint.quantized_modules())
    return replace(config, sym=True) if middle else config


def _is_middle(packed: PackedLinear) -> bool:
    zeros = unpack_zeros(packed.qzeros, packed.bits, packed.out_features, packed.checkpoint_format)
    return bool((zeros == 2 ** (packed.bits - 1)).all())


def _tensors(
    checkpoint: Checkpoint, row: FolderRow, config: QuantConfig, advance: Advance
) -> Iterator[tuple[str, Tensor]]:
    modules = checkpoint.quantized_modules()
    packed_names = {f"{m}.{suffix}" for m in modules for suffix in SUFFIXES}
    for name in checkpoint.tensors:
        if name not in packed_names:
            yield name, checkpoint.load(name)
    for module in modules:
        try:
            tensors = row.tensors(checkpoint.packed(module), config)
        except (UnsupportedModel, BadRequest) as error:
            raise UnsupportedModel(f"{module}: {error}") from None
        for suffix, tensor in tensors.items():
            yield f"{module}.{suffix}", tensor
        advance(1, module)


def _notes(checkpoint: Checkpoint, to: str) -> tuple[str, ...]:
    wide = {
        info.dtype
        for name, info in checkpoint.tensors.items()
        if name.endswith((".scales", ".weight_scale")) and info.dtype != "F16"
    }
    return (f"scales were {' and '.join(sorted(wide))}, now float16: rounded",) if wide else ()


def _gptq(version: CheckpointFormat) -> Callable[[PackedLinear, QuantConfig], dict[str, Tensor]]:
    def tensors(packed: PackedLinear, config: QuantConfig) -> dict[str, Tensor]:
        again = pack(unpack(packed), replace(config, checkpoint_format=version), packed.bias)
        found = {s: getattr(again, s) for s in ("qweight", "qzeros", "scales", "g_idx", "bias")}
        return {s: t for s, t in found.items() if t is not None}

    return tensors


def _gptq_config(version: CheckpointFormat) -> Callable[[QuantConfig, Checkpoint], Json]:
    def config_json(config: QuantConfig, checkpoint: Checkpoint) -> Json:
        stated = checkpoint.quant or {}
        meta = stated.get("meta")
        kept = {k: v for k, v in meta.items() if k != "quantizer"} if isinstance(meta, dict) else {}
        head = "lm_head" in checkpoint.quantized_modules()
        return config_to_json(replace(config, checkpoint_format=version), lm_head=head, meta=kept)

    return config_json


def _awq(packed: PackedLinear, config: QuantConfig) -> dict[str, Tensor]:
    return awq.from_packed(packed)


def awq_config(config: QuantConfig, checkpoint: Checkpoint) -> Json:
    """What AutoAWQ writes. Zero points are always stored, so `zero_point` is always true."""
    left = unquantized_linears(checkpoint)
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": config.group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": left or None,
        "meta": {"quantizer": [f"quantmill:{__version__}"]},
    }


def _compressed(packed: PackedLinear, config: QuantConfig) -> dict[str, Tensor]:
    if config.act_order is ActOrder.GROUPED and not is_sequential(packed.g_idx, packed.group_size):
        raise UnsupportedModel("its groups follow an act order (g_idx), which its readers no longer take")
    return compressed.from_packed(packed, config.sym)


def _compressed_config(config: QuantConfig, checkpoint: Checkpoint) -> Json:
    return compressed.config_to_json(config, unquantized_linears(checkpoint))


def unquantized_linears(checkpoint: Checkpoint) -> list[str]:
    """Linears that a reader would expect to be quantised and that are not: the head, and what was left alone."""
    from quantmill.architectures import module_names

    packed = set(checkpoint.quantized_modules())
    return [m for m in (*module_names(checkpoint.config), "lm_head") if m not in packed]


_V1, _V2 = CheckpointFormat.GPTQ, CheckpointFormat.GPTQ_V2
FOLDERS = {
    "awq": FolderRow(_awq, awq_config, quantize_config=False),
    "gptq": FolderRow(_gptq(_V1), _gptq_config(_V1), quantize_config=True),
    "gptq_v2": FolderRow(_gptq(_V2), _gptq_config(_V2), quantize_config=True),
    "compressed-tensors": FolderRow(_compressed, _compressed_config, quantize_config=False),
}
