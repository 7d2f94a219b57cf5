"""`bench`: how fast a model is here."""

from __future__ import annotations

from typing import Annotated

import typer

from quantmill.cli.app import app
from quantmill.cli.options import AsJson, Context, CpuExact, Device, Model, TensorParallel, Threads
from quantmill.console import Console


@app.command()
def bench(
    model: Model,
    prompt: Annotated[int, typer.Option(min=1, help="tokens of the prompt")] = 512,
    tokens: Annotated[int, typer.Option(min=1, help="tokens written after it")] = 64,
    at_context: Annotated[
        list[int] | None, typer.Option(min=1, help="tokens in the cache while others are written; repeatable")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="sequences that write together; repeatable")
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
    cpu_exact: CpuExact = False,
    context: Context = None,
    kv_tokens: Annotated[
        int | None, typer.Option(min=1, help="positions the cache holds, all sequences together")
    ] = None,
    selftest: Annotated[
        bool, typer.Option("--selftest/--no-selftest", help="a GPU compares its kernels first")
    ] = True,
    tensor_parallel: TensorParallel = 1,
    as_json: AsJson = False,
) -> None:
    """Measure how fast a model reads prompts and writes, beside what this machine's memory allows."""
    from quantmill.commands.benching import Plan, open_timed, read_rate_of
    from quantmill.commands.benching import bench as run
    from quantmill.sources import resolve

    console = Console(as_json)
    folder = resolve(model, notify=console.note, run=True)
    options = {"device": device, "threads": threads, "exact": cpu_exact, "context": context}
    options |= {"kv_tokens": kv_tokens, "selftest": selftest, "tensor_parallel": tensor_parallel}
    runtime, load_s = open_timed(folder, **options)
    plan = Plan(prompt, tokens, tuple(at_context or ()), tuple(batch or ()))
    console.document(run(runtime, plan, load_s, read_rate_of(runtime, threads), console))
    runtime.close()
