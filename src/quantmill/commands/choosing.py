"""`quantize --target-size` and `--target-kl`: bits for every part of a model, from measured sensitivities.

solve with every candidate (preset fast) -> KL of each part alone at 3 bits -> bits under the limit
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from quantmill.architectures import architecture_of, dimensions, linear_shapes
from quantmill.checkpoint import Checkpoint, open_checkpoint
from quantmill.console import Console, gigabytes, progress
from quantmill.errors import BadRequest
from quantmill.formats.gptq import dequantize, packed_bytes
from quantmill.quantize.allocate import Choice, Part, within_loss, within_size
from quantmill.quantize.job import BlockFinished, Event, Finished, Job
from quantmill.quantize.pipeline import quantize
from quantmill.quantize.plan import size_bytes
from quantmill.quantize.sensitivity import scaled_loss, sensitivities
from quantmill.runtime.load import load_model
from quantmill.types import BITS, Json, QuantConfig, Variant

REFERENCE = 3  # bits at which parts are measured: coarse enough to be seen, fine enough to add up
ROWS, ROW_TOKENS = 4, 512  # tokens that go through the model for every part
SCRATCH = ".quantmill-choosing"
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True, slots=True)
class Target:
    """The limit that was asked for: one of the two."""

    size: int | None = None  # bytes of the weight files
    kl: float | None = None  # nats per token
    text: str = ""


@dataclass(frozen=True, slots=True)
class Mix:
    """What was chosen, for people."""

    variant: Variant
    predicted_kl: float
    bits: dict[int, int]  # modules by bits


def parse_target(size: str | None, kl: float | None) -> Target | None:
    """The limit from the flags, None without one. Raises BadRequest for both, or for a size that is none."""
    if size is not None and kl is not None:
        raise BadRequest("--target-size and --target-kl are two limits: give one of them")
    if kl is not None:
        if kl <= 0:
            raise BadRequest(f"--target-kl {kl} cannot be met: give a positive number of nats, such as 0.02")
        return Target(kl=kl, text=f"{kl:g}nats")
    if size is None:
        return None
    found = re.fullmatch(r"([\d.]+)\s*([KMG]?I?B?)", size.strip().upper())
    try:
        number = float(found[1]) if found else -1.0
    except ValueError:
        number = -1.0
    unit = UNITS.get(found[2]) if found else None
    if unit is None or number <= 0:
        raise BadRequest(f"--target-size {size!r} is no size: write 4.2GB, 900MB or 3GiB")
    return Target(size=round(number * unit), text=size.strip().replace(" ", ""))


def choose_bits(job: Job, base: QuantConfig, target: Target, console: Console) -> Mix:
    """A variant with bits per part. `job` says source, tokens and device; its preset is used afterwards only.

    Raises BadRequest where the limit cannot be met.
    """
    checkpoint = open_checkpoint(job.source)
    scratch = job.out / SCRATCH
    candidates = tuple(Variant(f"{bits}bit", dataclasses.replace(base, bits=bits)) for bits in BITS)
    try:
        solved = _solve(job, candidates, scratch)
        alone, together = _measure(job, checkpoint, solved[f"{REFERENCE}bit"].folder, console)
        parts = _parts(checkpoint, candidates, solved, alone, together)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return _mix(checkpoint.config, base, parts, target)


def _solve(job: Job, candidates: Sequence[Variant], scratch: Path) -> dict[str, Finished]:
    asked = dataclasses.replace(
        job,
        out=scratch,
        variants=tuple(candidates),
        preset="fast",
        tune_blocks=False,
        distill=False,
        resume=(scratch.exists()),
    )
    layers = dimensions(open_checkpoint(job.source).config).layers
    with progress("trying 2, 3, 4 and 8 bits", layers * len(candidates)) as advance:

        def at(event: Event) -> None:
            if isinstance(event, BlockFinished):
                advance(1, f"{event.branch} block {event.index}")

        done = quantize(asked, at)
    return {f.branch: f for f in done}


def part_modules(config: Json) -> dict[str, tuple[str, ...]]:
    """Every part's full module names: the groups of every block."""
    row, layers = architecture_of(config), dimensions(config).layers
    return {
        f"{row.blocks_prefix}.{i}.{group.name}": tuple(f"{row.blocks_prefix}.{i}.{m}" for m in group.modules)
        for i in range(layers)
        for group in row.groups
    }


def _measure(
    job: Job, checkpoint: Checkpoint, folder: Path, console: Console
) -> tuple[dict[str, float], float]:
    parts, packed = part_modules(checkpoint.config), open_checkpoint(folder)
    model = load_model(job.source, device=job.device)

    def quantised(module: str) -> Tensor:
        import torch

        return dequantize(packed.packed(module), torch.float32)

    rows = job.calibration.blocks[-ROWS:, :ROW_TOKENS]
    console.note(f"measuring {len(parts)} parts on {rows.numel()} tokens")
    with progress("measuring", len(parts)) as advance:
        return sensitivities(model, rows, parts, quantised, lambda name: advance(1, name))


def _parts(
    checkpoint: Checkpoint,
    candidates: Sequence[Variant],
    solved: Mapping[str, Finished],
    alone: Mapping[str, float],
    together: float,
) -> list[Part]:
    losses = {v.branch: {m.name: m.loss for m in solved[v.branch].modules} for v in candidates}
    shapes, total = linear_shapes(checkpoint.config), sum(alone.values())
    parts = []
    for name, modules in part_modules(checkpoint.config).items():
        suffixes = [m.split(".", 3)[3] for m in modules]
        reference = sum(losses[f"{REFERENCE}bit"][m] for m in modules)
        choices = [
            Choice(
                v.config,
                sum(
                    packed_bytes(v.config, shapes[s].in_features, shapes[s].out_features, shapes[s].bias)
                    for s in suffixes
                ),
                scaled_loss(
                    alone[name], together, total, sum(losses[v.branch][m] for m in modules), reference
                ),
            )
            for v in candidates
        ]
        parts.append(Part(name, modules, tuple(choices)))
    return parts


def _mix(config: Json, base: QuantConfig, parts: Sequence[Part], target: Target) -> Mix:
    if target.size is not None:
        whole = size_bytes(config, base)
        linears = sum(c.size for p in parts for c in p.choices if c.config == base)
        if target.size < whole - linears:
            raise BadRequest(
                f"{target.text}: embeddings and norms alone take {gigabytes(whole - linears)}: allow more"
            )
        chosen = within_size(parts, target.size - (whole - linears))
    else:
        chosen = within_loss(parts, target.kl or 0.0)
    counts = Counter(c.config.bits for p, c in zip(parts, chosen, strict=True) for _ in p.modules)
    common = dataclasses.replace(base, bits=counts.most_common(1)[0][0])
    different = tuple(
        (m, c.config) for p, c in zip(parts, chosen, strict=True) if c.config != common for m in p.modules
    )
    branch = f"gptq-mixed-{target.text}-{base.group_size}g"
    variant = Variant(branch, common, dynamic=different)
    return Mix(variant, sum(c.loss for c in chosen), dict(sorted(counts.items())))
