"""`check`, `eval` and `card`: what a folder is worth."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Annotated

import typer

from quantmill.cli.app import app
from quantmill.cli.options import AsJson, Device, Model, Threads
from quantmill.console import Console
from quantmill.types import EvalReport


@app.command()
def check(
    model: Model,
    fix: Annotated[
        bool, typer.Option("--fix", help="mend what can be mended exactly; the folder as it was is kept")
    ] = False,
    base: Annotated[
        str | None, typer.Option(help="with --fix: the original, for missing tokenizer and template files")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Examine a quantised folder: tensors, configs, zero points, companions, and who can load it."""
    from quantmill.commands.describing import check_to_json, mend
    from quantmill.doctor import check as examine
    from quantmill.sources import gguf_file, resolve

    console = Console(as_json)
    folder = gguf_file(model) or resolve(model, notify=console.note, run=True)
    if fix:
        mend(folder, base, console)
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
    versus: Annotated[
        str | None, typer.Option(help="another variant, compared on the same windows, intervals paired")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="instead of a text: tasks of lm-eval, or YAML files (extra: tasks)")
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
    from quantmill.commands import measuring

    console = Console(as_json, mute=os.environ.get("RANK", "0") != "0")  # torchrun starts several
    if tasks is not None:
        from quantmill.commands.tasks import run_tasks, task_lines

        results = run_tasks([m for m in (model, versus, against) if m], tasks, device, console)
        for line in task_lines(results):
            console.say(line)
        console.document({"tasks": results})
        return
    protocol = measuring.Protocol(text, ctx, windows, device, threads, save)
    if versus is not None:
        reports, found = measuring.versus(model, versus, against, protocol, console)
        more = {"versus": dataclasses.asdict(found), "versus_report": _known(reports[versus])}
        lines = measuring.versus_lines(versus, found)
    else:
        reports, more, lines = measuring.measure({model: model}, against, protocol, console), {}, []
    for line in [*measuring.report_lines(reports[model]), *lines]:
        console.say(line)
    console.document(_known(reports[model]) | more)


def _known(report: EvalReport) -> dict[str, object]:
    return {k: v for k, v in dataclasses.asdict(report).items() if v is not None}


@app.command()
def card(
    folder: Annotated[Path, typer.Argument(help="the folder that holds one folder per branch")],
    name: Annotated[str | None, typer.Option(help="the repository's name, as owner/name")] = None,
    as_json: AsJson = False,
) -> None:
    """Write README.md from the reports found, with pictures of size against loss and loss by layer."""
    from quantmill.commands.describing import describe
    from quantmill.commands.family import describe_family, repositories

    console = Console(as_json)
    paths = describe_family(folder, name) if repositories(folder) else [describe(folder, name)]
    for path in paths:
        console.say(f"wrote {path}")
    console.document({"card": str(paths[0]), "cards": [str(p) for p in paths]})
