"""From solved blocks to a complete model folder: weights, configs, tokenizer, chat template, report.

A folder appears under its name only when everything is in it.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import quantmill
from quantmill.architectures import module_names
from quantmill.checkpoint import Checkpoint
from quantmill.errors import BadRequest
from quantmill.files import atomic_folder, write_json
from quantmill.formats.gptq import config_to_json
from quantmill.manifest import write_manifest
from quantmill.portable import public_command, public_source
from quantmill.quantize.job import Finished, Job
from quantmill.types import Json, ModuleReport, Variant
from quantmill.weights import save_tensors

# Taken over from the source as they are, where they exist.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE",
)
REPORT = "quantize_report.json"
WEIGHTS = ("*.safetensors", "*.gguf")


def weight_bytes(folder: Path) -> int:
    """Bytes of a folder's weight files."""
    return sum(f.stat().st_size for pattern in WEIGHTS for f in folder.glob(pattern))


def read_finished(job: Job, variant: Variant, identity: Json) -> Finished | None:
    """The variant's folder if an earlier run completed it. Raises BadRequest when it may not be reused."""
    folder = job.out / variant.branch
    report = folder / REPORT
    if not folder.exists():
        return None
    if not job.resume:
        raise BadRequest(
            f"{folder} exists: use another --out, remove it, or add --resume to keep what is done"
        )
    if not report.exists() or json.loads(report.read_text()).get("identity") != identity:
        raise BadRequest(f"{folder} was made from another source, data set or setting: use another --out")
    known = json.loads(report.read_text())
    modules = tuple(ModuleReport(**m) for m in known["modules"])
    return Finished(variant.branch, folder, weight_bytes(folder), modules, known["seconds"])


def write_variant(
    job: Job,
    variant: Variant,
    checkpoint: Checkpoint,
    solved: Iterable[tuple[str, Tensor]],
    report: Json,
) -> Finished:
    """Write the folder of one variant. `solved` yields the packed tensors; the rest comes from the source."""
    target = job.out / variant.branch
    with atomic_folder(target) as folder:
        save_tensors(folder, _all_tensors(checkpoint, solved))
        _write_configs(folder, checkpoint, variant, report)
        copy_companions(checkpoint.folder, folder, checkpoint.config)
        write_json(folder / REPORT, report)
        write_manifest(folder)
    modules = tuple(ModuleReport(**m) for m in report["modules"])
    return Finished(variant.branch, target, weight_bytes(target), modules, report["seconds"])


def _all_tensors(
    checkpoint: Checkpoint, solved: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """The solved tensors, then those of the source that they do not replace, in float16."""
    replaced = {f"{m}.{suffix}" for m in module_names(checkpoint.config) for suffix in ("weight", "bias")}
    for name, tensor in solved:
        replaced.add(name)
        yield name, tensor
    for name in checkpoint.tensors:
        if name not in replaced:
            yield name, to_half(checkpoint.load(name))


def to_half(tensor: Tensor) -> Tensor:
    """Float tensors in float16, as GPTQ files hold them; one that would overflow keeps its own type."""
    if not tensor.is_floating_point():
        return tensor
    half = tensor.half()
    return half if bool(torch.isfinite(half).all()) else tensor


def _write_configs(folder: Path, checkpoint: Checkpoint, variant: Variant, report: Json) -> None:
    meta = {
        "dataset": report["calibration"]["dataset"],
        "dataset_sha256": report["calibration"]["fingerprint"],
        "samples": report["calibration"]["samples"],
        "seqlen": report["calibration"]["seqlen"],
        "preset": report["preset"],
        "act_order": str(variant.config.act_order),
    }
    quant = config_to_json(variant.config, meta=meta, dynamic=variant.dynamic)
    config = {k: v for k, v in checkpoint.config.items() if k not in ("_name_or_path", "torch_dtype")}
    write_json(folder / "config.json", config | {"dtype": "float16", "quantization_config": quant})
    write_json(folder / "quantize_config.json", quant)


def copy_companions(source: Path, folder: Path, config: Json) -> None:
    """Copy tokenizer files and the card (as ORIGINAL_CARD.md); make a generation config if there is none."""
    for name in COMPANIONS:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    if (source / "README.md").exists():
        shutil.copyfile(source / "README.md", folder / "ORIGINAL_CARD.md")
    if not (folder / "generation_config.json").exists():
        tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
        write_json(
            folder / "generation_config.json", {k: config[k] for k in tokens if config.get(k) is not None}
        )


def build_report(
    job: Job,
    variant: Variant,
    modules: Iterable[ModuleReport],
    *,
    rows: int,
    identity: Json,
    seconds: float,
    peak_ram_bytes: int,
) -> Json:
    """The record that makes a variant repeatable: settings, data, versions, and what became of every module.

    rows: of calibration tokens that the variant used; identity: what decides its bytes.
    """
    listed = list(modules)
    calibration = job.calibration
    return {
        "quantmill": quantmill.__version__,
        "source": public_source(job.source_name),
        "branch": variant.branch,
        "config": dataclasses.asdict(variant.config) | {"checkpoint_format": str(variant.config.zero_format)},
        "preset": job.preset,
        **({"dynamic": {m: c.bits for m, c in variant.dynamic}} if variant.dynamic else {}),
        "calibration": {
            "dataset": calibration.name,
            "samples": rows,
            "samples_drawn": len(calibration.blocks),
            "seqlen": calibration.blocks.shape[1],
            "tokens": rows * calibration.blocks.shape[1],
            "seed": calibration.seed,
            "fingerprint": calibration.fingerprint,
            "documents": calibration.documents,
            "dropped": calibration.dropped,
        },
        "fallbacks": [f"{m.name}: {m.fallback}" for m in listed if m.fallback],
        "versions": {p: importlib.metadata.version(p) for p in ("torch", "transformers", "numpy", "numba")},
        "command": public_command(job.command),
        "identity": identity,
        "seconds": seconds,
        "peak_ram_bytes": peak_ram_bytes,
        "modules": [dataclasses.asdict(m) for m in listed],
    }
