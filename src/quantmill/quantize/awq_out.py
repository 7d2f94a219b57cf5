"""From solved blocks to an AWQ folder: packed linears in the GEMM layout, config, tokenizer, report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from quantmill import __version__
from quantmill.architectures import linear_shapes, module_names
from quantmill.checkpoint import Checkpoint
from quantmill.errors import UnsupportedModel
from quantmill.files import atomic_folder, write_json
from quantmill.formats import awq
from quantmill.manifest import write_manifest
from quantmill.quantize.folder import REPORT, copy_companions, to_half, weight_bytes
from quantmill.quantize.job import Finished, Job
from quantmill.types import Json, ModuleReport, PackedLinear, QuantConfig, Variant
from quantmill.weights import save_tensors

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")


def write_awq_variant(
    job: Job, variant: Variant, checkpoint: Checkpoint, solved: Iterable[tuple[str, Tensor]], report: Json
) -> Finished:
    """Write OUT/BRANCH, whole or not at all. Raises UnsupportedModel for shapes that the layout cannot hold."""
    target = job.out / variant.branch
    with atomic_folder(target) as folder:
        save_tensors(folder, _tensors(checkpoint, dict(solved), variant.config))
        config = {k: v for k, v in checkpoint.config.items() if k not in ("_name_or_path", "torch_dtype")}
        quant = quant_json(variant.config)
        write_json(folder / "config.json", config | {"dtype": "float16", "quantization_config": quant})
        copy_companions(checkpoint.folder, folder, checkpoint.config)
        write_json(folder / REPORT, report | {"container": variant.container})
        write_manifest(folder)
    modules = tuple(ModuleReport(**m) for m in report["modules"])
    return Finished(variant.branch, target, weight_bytes(target), modules, report["seconds"])


def quant_json(config: QuantConfig) -> Json:
    """What AutoAWQ writes; zero points are always stored."""
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": config.group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
        "meta": {"quantizer": [f"quantmill:{__version__}"], "damp_percent": config.damp_percent},
    }


def _tensors(
    checkpoint: Checkpoint, solved: dict[str, Tensor], config: QuantConfig
) -> Iterator[tuple[str, Tensor]]:
    modules = module_names(checkpoint.config)
    shapes = linear_shapes(checkpoint.config)
    for module in modules:
        shape = shapes[module.split(".", 3)[-1]]
        packed = PackedLinear(
            **{s: solved[f"{module}.{s}"] for s in SUFFIXES},
            bias=solved.get(f"{module}.bias"),
            bits=config.bits,
            group_size=config.group_size,
            in_features=shape.in_features,
            out_features=shape.out_features,
            checkpoint_format=config.zero_format,
        )
        try:
            tensors = awq.from_packed(packed)
        except UnsupportedModel as error:
            raise UnsupportedModel(f"{module}: {error}") from None
        for suffix, tensor in tensors.items():
            yield f"{module}.{suffix}", tensor
    linears = set(modules)
    for name in checkpoint.tensors:
        if name.rpartition(".")[0] not in linears:
            yield name, solved[name].to(torch.float16) if name in solved else to_half(checkpoint.load(name))
