"""`plan` and `quantize`: from a source to folders."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

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
    GridName,
    Grouped,
    GroupSize,
    Samples,
    Seqlen,
    Source,
    Sym,
    Threads,
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
    as_json: AsJson = False,
) -> None:
    """Predict size, memory and time of each variant. Reads config.json, nothing else."""
    from quantmill.files import read_json
    from quantmill.quantize.plan import measure_flops, quantised_weights
    from quantmill.quantize.plan import plan as predict
    from quantmill.sources import resolve

    console = Console(as_json)
    config = read_json(resolve(source, files="config", notify=console.note) / "config.json")
    chosen = choose_variants(variant, grid, bits, group_size, default_grid="card")
    rows = predict(config, chosen, samples=samples, seqlen=seqlen, flops_per_second=measure_flops())
    console.say(f"{source}: {quantised_weights(config):,} weights to quantise, {samples} x {seqlen} tokens\n")
    head = ("branch", "bits", "group", "act order", "damp", "size", "bits/weight", "VRAM", "RAM", "time here")
    console.table(head, [_plan_row(r.to_json()) for r in rows])
    console.say("\nVRAM, RAM: to quantise on a GPU or on the CPU; to run, count the size and the KV cache.")
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
    out: Annotated[Path, typer.Option(help="a folder; each variant becomes a folder in it, named by branch")],
    variant: Variants = None,
    grid: GridName = None,
    bits: Bits = None,
    group_size: GroupSize = None,
    act_order: ActOrderFlag = None,
    grouped: Grouped = False,
    sym: Sym = None,
    damp: Damp = None,
    true_sequential: Annotated[bool, typer.Option(help="each linear sees its quantised predecessors")] = True,
    dataset: Dataset = "python-docs",
    seqlen: Seqlen = 2048,
    samples: Samples = 128,
    seed: Annotated[int, typer.Option(help="draws the calibration blocks")] = 0,
    preset: Annotated[str, typer.Option(help="fast, or best: several times the time, less loss")] = "fast",
    tune_blocks: Annotated[
        bool, typer.Option("--tune-blocks", help="with best: train scales and norms block by block")
    ] = False,
    target_size: Annotated[
        str | None, typer.Option(help="choose bits per module for weight files of this size, e.g. 4.2GB")
    ] = None,
    target_kl: Annotated[
        float | None, typer.Option(help="choose bits per module for this many nats per token, e.g. 0.02")
    ] = None,
    distill: Annotated[
        bool, typer.Option("--distill", help="with best: train scales and norms on the original's logits")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="go on where an interrupted run stopped")] = False,
    device: Device = "auto",
    threads: Threads = None,
    max_vram: Annotated[str | None, typer.Option(help="GPU memory that may be taken, e.g. 16GB")] = None,
    max_ram: Annotated[str | None, typer.Option(help="host memory that may be taken, e.g. 12GB")] = None,
    format: Annotated[str | None, typer.Option(help=FORMAT_HELP)] = None,
    events: Annotated[Path | None, typer.Option(help="write a line of JSON for every event there")] = None,
    as_json: AsJson = False,
) -> None:
    """Quantise a model: one complete folder per variant."""
    from quantmill.commands.choosing import parse_target
    from quantmill.commands.making import Request, make

    console = Console(as_json, mute=os.environ.get("RANK", "0") != "0")  # torchrun starts several
    family_asked = grid == FAMILY and format is None
    choice = (
        family()
        if family_asked
        else choose_variants(variant, grid, bits, group_size, act_order, grouped, sym)
    )
    choice = choice if family_asked else in_container(choice, format, sym=sym)
    request = Request(
        source=source,
        out=out,
        variants=tuple(
            dataclasses.replace(v, config=_changed(v.config, damp, true_sequential)) for v in choice
        ),
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
    )
    made = make(request, console)
    console.document(made.to_json())


def _changed(config: QuantConfig, damp: float | None, true_sequential: bool) -> QuantConfig:
    """A variant's configuration with what was asked for all of them."""
    return dataclasses.replace(
        config,
        damp_percent=config.damp_percent if damp is None else damp,
        true_sequential=true_sequential,
    )


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
