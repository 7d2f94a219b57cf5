"""From solved blocks to a GGUF variant: a folder with one `.gguf` file, the report, and what says whence it came.

Embeddings and the head have no Hessian: they are rounded to nearest on their type's grid. Norms and biases
are float32, as llama.cpp wants them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import quantmill
from quantmill.architectures import module_names
from quantmill.checkpoint import Checkpoint
from quantmill.files import atomic_folder, write_json
from quantmill.formats.gguf import BlockType
from quantmill.gguf_target import GgufModel, GgufTensor, write_gguf
from quantmill.manifest import write_manifest
from quantmill.quantize.folder import REPORT
from quantmill.quantize.gguf_mix import tensor_types
from quantmill.quantize.gguf_solve import round_to_nearest
from quantmill.quantize.gguf_step import BLOCKS, to_bytes
from quantmill.quantize.job import Finished, Job
from quantmill.types import Json, ModuleReport, Variant

ROWS_AT_ONCE = 4096
PAPERS = {
    "README.md": "ORIGINAL_CARD.md",
    "LICENSE": "LICENSE",
    "chat_template.jinja": "chat_template.jinja",
    "tokenizer_config.json": "tokenizer_config.json",
}


def write_gguf_variant(
    job: Job, variant: Variant, checkpoint: Checkpoint, solved: Iterable[tuple[str, Tensor]], report: Json
) -> Finished:
    """Write OUT/BRANCH/NAME.MIX.gguf and the report beside it, whole or not at all."""
    mix = variant.container.partition(":")[2]
    name = model_name(job)
    target = job.out / variant.branch
    with atomic_folder(target) as folder:
        path = folder / f"{name.lower()}.{mix}.gguf"
        tensors = listed(checkpoint, tensor_types(checkpoint.config, mix), dict(solved))
        model = GgufModel(
            name=name,
            config=checkpoint.config,
            folder=checkpoint.folder,
            file_type=mix,
            quantized_by=f"quantmill {quantmill.__version__}",
        )
        notes = write_gguf(path, model, tensors)
        write_json(folder / REPORT, report | {"container": variant.container, "notes": list(notes)})
        _copy_papers(checkpoint.folder, folder)
        write_manifest(folder)
    modules = tuple(ModuleReport(**m) for m in report["modules"])
    size = sum(f.stat().st_size for f in target.glob("*.gguf"))
    return Finished(variant.branch, target, size, modules, report["seconds"])


def _copy_papers(source: Path, folder: Path) -> None:
    """What a card is written from: the original's card, its licence and its chat template."""
    for name, target in PAPERS.items():
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / target)


def model_name(job: Job) -> str:
    """The model's name without owner, folders or ending."""
    return Path(job.source_name.partition(":")[0]).name.removesuffix(".gguf") or "model"


def listed(
    checkpoint: Checkpoint, types: dict[str, BlockType], solved: dict[str, Tensor]
) -> list[GgufTensor]:
    """Every tensor of the file: solved linears as they are, the rest of the model from the source."""
    tensors = []
    linears = set(module_names(checkpoint.config))
    for name, info in checkpoint.tensors.items():
        module, _, suffix = name.rpartition(".")
        if module in linears and suffix == "weight":
            tensors.append(_solved(name, info.shape, types[module], solved[f"{module}.{BLOCKS}"]))
        elif module in types and suffix == "weight":
            tensors.append(_rounded(checkpoint, name, info.shape, types[module]))
        elif not name.endswith("rotary_emb.inv_freq"):
            tensors.append(_plain(checkpoint, name, info.shape, solved))
    return tensors


def _solved(name: str, shape: tuple[int, ...], kind: BlockType, rows: Tensor) -> GgufTensor:
    return GgufTensor(name, shape, kind.name, rows.numpy)


def _rounded(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], kind: BlockType) -> GgufTensor:
    def rows() -> NDArray[Any]:
        parts = torch.split(checkpoint.load(name), ROWS_AT_ONCE)
        return np.concatenate([to_bytes(round_to_nearest(p.float(), kind)).numpy() for p in parts])

    return GgufTensor(name, shape, kind.name, rows)


def _plain(
    checkpoint: Checkpoint, name: str, shape: tuple[int, ...], solved: dict[str, Tensor]
) -> GgufTensor:
    matrix = len(shape) > 1
    dtype = torch.float16 if matrix else torch.float32
    load: Callable[[], Tensor] = lambda: solved[name] if name in solved else checkpoint.load(name)  # noqa: E731
    return GgufTensor(name, shape, "F16" if matrix else "F32", lambda: load().to(dtype).numpy())
