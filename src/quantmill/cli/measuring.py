"""`check`, `eval` and `card`: what a folder is worth."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from quantmill.cli.app import app
from quantmill.cli.options import AsJson, Device, Model, Threads
from quantmill.console import Console


@app.command()
def check(
    model: Model,
    fix: Annotated[
        bool, typer.Option("--fix", help="mend what can be told from the files: the two configs")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Examine a quantised folder: tensors, configs, zero points, companions, and who can load it."""
    from quantmill.commands.describing import check_to_json
    from quantmill.doctor import check as examine
    from quantmill.doctor import fix as mend
    from quantmill.sources import resolve

    console = Console(as_json)
    folder = resolve(model, notify=console.note)
    for name in mend(folder) if fix else ():
        console.say(f"mended  {name}")
    report = examine(folder)
    for f in report.findings:
        console.say(f"{f.level:<8}{f.where}: {f.message}")
    console.say()
    for loader, verdict in report.loaders.items():
        console.say(f"{loader}: {verdict}")
    console.document(check_to_json(report))
    if not report.ok:
        raise typer.Exit(2)


@app.command("eval")
def eval_(
    model: Model,
    against: Annotated[
        str | None, typer.Option(help="the original model, to measure the divergence from")
    ] = None,
    text: Annotated[str, typer.Option(help="a text file, or a data set as for --dataset")] = "python-library",
    ctx: Annotated[int, typer.Option(min=2, help="tokens per window")] = 1024,
    windows: Annotated[int, typer.Option(min=1, help="windows to score")] = 16,
    save: Annotated[
        bool, typer.Option(help="keep the result as eval_report.json in the model's folder")
    ] = True,
    device: Device = "auto",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Measure perplexity and, against the original, KL divergence and top-1 agreement."""
    from quantmill.commands.measuring import Protocol, measure, report_lines

    console = Console(as_json)
    protocol = Protocol(text, ctx, windows, device, threads, save)
    report = measure({model: model}, against, protocol, console)[model]
    for line in report_lines(report):
        console.say(line)
    console.document({k: v for k, v in dataclasses.asdict(report).items() if v is not None})


@app.command()
def card(
    folder: Annotated[Path, typer.Argument(help="the folder that holds one folder per branch")],
    name: Annotated[str | None, typer.Option(help="the repository's name, as owner/name")] = None,
    as_json: AsJson = False,
) -> None:
    """Write README.md from the reports found, with pictures of size against loss and loss by layer."""
    from quantmill.commands.describing import describe

    console = Console(as_json)
    path = describe(folder, name)
    console.say(f"wrote {path}")
    console.document({"card": str(path)})
