"""`plan` and `quantize`: from a source to folders."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from collections.abc import Iterable
from typing import Annotated, Any

import typer

from quantmill.cli.app import app
from quantmill.cli.containers import FAMILY, family, in_container
from quantmill.cli.containers import HELP as FORMAT_HELP
from quantmill.cli.options import (
    DEFAULT,
    ActOrderFlag,
    AsJson,
    Bits,
    Damp,
    Dataset,
    Device,
    Distill,
    Events,
    GridName,
    Grouped,
    GroupSize,
    MaxRam,
    MaxVram,
    Out,
    PresetName,
    Resume,
    Samples,
    Seed,
    Seqlen,
    Source,
    Sym,
    TargetKl,
    TargetSize,
    Threads,
    TrueSequential,
    TuneBlocks,
    Variants,
)
from quantmill.console import Console, gigabytes, seconds
from quantmill.errors import BadRequest
from quantmill.types import ActOrder, QuantConfig, Variant


@app.command()
def plan(
    source: Source,
    variant: Variants = None,
    grid: GridName = None,
    bits: Bits = None,
    group_size: GroupSize = None,
    samples: Samples = 128,
    seqlen: Seqlen = 2048,
    preset: PresetName = "fast",
    max_vram: MaxVram = None,
    max_ram: MaxRam = None,
    as_json: AsJson = False,
) -> None:
    """Predict size, memory and time of each variant. Reads config.json, nothing else."""
    from quantmill.commands.machine import memory_limit
    from quantmill.files import read_json
    from quantmill.quantize.plan import measure_flops, quantised_weights
    from quantmill.quantize.plan import plan as predict
    from quantmill.quantize.presets import refuse_unknown
    from quantmill.sources import resolve

    console = Console(as_json)
    config = read_json(resolve(source, files="config", notify=console.note) / "config.json")
    if config.get("quantization_config"):
        console.note(f"{source} is quantised already: this is what its unquantised model would become")
    chosen = choose_variants(variant, grid, bits, group_size, default_grid="card")
    refuse_unknown(preset, trained=False)
    rows = predict(
        config,
        chosen,
        samples=samples,
        seqlen=seqlen,
        flops_per_second=measure_flops(),
        max_vram=memory_limit(max_vram, "--max-vram"),
        max_ram=memory_limit(max_ram, "--max-ram"),
        preset=preset,
    )
    console.say(f"{source}: {quantised_weights(config):,} weights to quantise, {samples} x {seqlen} tokens\n")
    head = ("branch", "bits", "group", "act order", "damp", "size", "bits/weight", "VRAM", "RAM", "time here")
    console.table(head, [_plan_row(r.to_json()) for r in rows])
    console.say("\nVRAM, RAM: to quantise on a GPU or on the CPU; to run, count the size and the KV cache.")
    console.say(f"Beside a GPU, {gigabytes(rows[0].peak_host_bytes)} of host memory.")
    console.document({"source": source, "variants": [r.to_json() for r in rows]})


def _plan_row(row: dict[str, object]) -> tuple[str, ...]:
    size, vram, ram = (
        gigabytes(float(str(row[k]))) for k in ("size_bytes", "peak_vram_bytes", "peak_ram_bytes")
    )
    act = "yes" if row["desc_act"] else "no"
    fixed = (row["branch"], row["bits"], row["group_size"], act, row["damp_percent"])
    return (
        *map(str, fixed),
        size,
        f"{row['bits_per_weight']}",
        vram,
        ram,
        seconds(float(str(row["seconds"]))),
    )


@app.command()
def quantize(
    source: Source,
    out: Out,
    variant: Variants = None,
    grid: GridName = None,
    bits: Bits = None,
    group_size: GroupSize = None,
    act_order: ActOrderFlag = None,
    grouped: Grouped = False,
    sym: Sym = None,
    damp: Damp = None,
    true_sequential: TrueSequential = True,
    dataset: Dataset = "python-docs",
    seqlen: Seqlen = 2048,
    samples: Samples = 128,
    seed: Seed = 0,
    preset: PresetName = "fast",
    tune_blocks: TuneBlocks = False,
    target_size: TargetSize = None,
    target_kl: TargetKl = None,
    distill: Distill = False,
    resume: Resume = False,
    device: Device = "auto",
    threads: Threads = None,
    max_vram: MaxVram = None,
    max_ram: MaxRam = None,
    format: Annotated[str | None, typer.Option(help=FORMAT_HELP)] = None,
    events: Events = None,
    as_json: AsJson = False,
) -> None:
    """Quantise a model: one complete folder per variant."""
    from quantmill.commands.choosing import parse_target
    from quantmill.commands.making import Request, make

    console = Console(as_json, mute=os.environ.get("RANK", "0") != "0")  # torchrun starts several
    family_asked = grid == FAMILY and format is None
    typed = (variant, grid, bits, group_size, act_order, grouped, sym)
    choice = family() if family_asked else in_container(choose_variants(*typed), format, sym=sym)
    request = Request(
        source=source,
        out=out,
        variants=_changed(choice, damp, true_sequential),
        dataset=dataset,
        seqlen=seqlen,
        samples=samples,
        seed=seed,
        preset=preset,
        tune_blocks=tune_blocks,
        distill=distill,
        target=parse_target(target_size, target_kl),
        resume=resume,
        device=device,
        threads=threads,
        command=shlex.join(["quantmill", *sys.argv[1:]]),
        max_vram=max_vram,
        max_ram=max_ram,
        events=events,
        family=family_asked,
    )
    console.document(make(request, console).to_json())


def _changed(variants: Iterable[Variant], damp: float | None, true_sequential: bool) -> tuple[Variant, ...]:
    """The variants with what was asked for all of them."""
    more: dict[str, Any] = {"true_sequential": true_sequential}
    more |= {} if damp is None else {"damp_percent": damp}
    return tuple(dataclasses.replace(v, config=dataclasses.replace(v.config, **more)) for v in variants)


def choose_variants(
    typed: list[str] | None,
    grid: str | None,
    bits: int | None = None,
    group_size: int | None = None,
    act_order: bool | None = None,
    grouped: bool = False,
    sym: bool | None = None,
    default_grid: str | None = None,
) -> tuple[Variant, ...]:
    """The variants that the flags ask for. Raises BadRequest when they ask twice, or for an unknown grid."""
    from quantmill.hub.variants import GRIDS, branch_name, parse_variant

    single = any(f is not None for f in (bits, group_size, act_order, sym)) or grouped
    if (typed is not None) + (grid is not None) + single > 1:
        raise BadRequest(
            "choose variants by --variant, by --grid or by --bits and its companions, not by two of them"
        )
    if not typed and not single:
        grid = grid or default_grid
    if grid is not None:
        if grid not in GRIDS:
            raise BadRequest(f"there is no grid {grid!r}: use --grid {' or '.join(GRIDS)}")
        return GRIDS[grid]
    if typed:
        chosen = tuple(parse_variant(text) for text in typed)
        if len({v.branch for v in chosen}) < len(chosen):
            raise BadRequest("two --variant options name the same branch: leave one out")
        return chosen
    order = ActOrder.GROUPED if grouped else ActOrder.NONE if act_order is False else ActOrder.STATIC
    config = QuantConfig(
        bits=DEFAULT.bits if bits is None else bits,
        group_size=DEFAULT.group_size if group_size is None else group_size,
        act_order=order,
        sym=DEFAULT.sym if sym is None else sym,
    )
    return (Variant(branch_name(config), config),)
