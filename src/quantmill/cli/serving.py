"""`serve`: models for programs and people."""

from __future__ import annotations

from typing import Annotated

import typer

from quantmill.cli.app import app
from quantmill.cli.options import AsJson, Context, CpuExact, Device, TensorParallel, Threads
from quantmill.console import Console

GIGABYTE = 1_000_000_000


@app.command()
def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="folders, .gguf files, owner/name or owner/name:branch; NAME=SOURCE gives another name"
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="the address to listen on; others than loopback need a key")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one")] = 8000,
    api_key: Annotated[
        list[str] | None, typer.Option(envvar="QUANTMILL_API_KEY", help="may ask the models; repeatable")
    ] = None,
    admin_key: Annotated[
        list[str] | None,
        typer.Option(envvar="QUANTMILL_ADMIN_KEY", help="may load and drop models, too; repeatable"),
    ] = None,
    no_auth: Annotated[
        bool, typer.Option("--no-auth", help="let everybody in who reaches the address")
    ] = False,
    ui: Annotated[bool, typer.Option("--ui", help="the web UI, too (needs quantmill[ui])")] = False,
    context: Context = None,
    kv_tokens: Annotated[int | None, typer.Option(min=64, help="tokens that a model's cache holds")] = None,
    memory: Annotated[
        float | None,
        typer.Option(min=0.01, help="GB that all models may take; default: 80 % of the device's"),
    ] = None,
    max_waiting: Annotated[int, typer.Option(min=1, help="requests that may wait; then 429")] = 256,
    max_concurrent: Annotated[int, typer.Option(min=1, help="requests under way; then 429")] = 256,
    engine_process: Annotated[
        bool | None,
        typer.Option(
            "--engine-process/--engine-thread",
            help="run a model beside the server or inside it; default: beside it on a GPU",
            show_default=False,
        ),
    ] = None,
    fast_batches: Annotated[
        bool,
        typer.Option(
            "--fast-batches",
            help="on a GPU: faster with more than 32 answers at once, but what an answer says may then depend on "
            "the others",
        ),
    ] = False,
    cpu_exact: CpuExact = False,
    device: Device = "auto",
    threads: Threads = None,
    tensor_parallel: TensorParallel = 1,
    as_json: AsJson = False,
) -> None:
    """Serve models: OpenAI's API, metrics, and a web UI."""
    from quantmill.commands.serving import serve_models
    from quantmill.runtime.engine_types import EngineConfig
    from quantmill.serve.settings import ServeSettings

    settings = ServeSettings(
        host=host,
        port=port,
        api_keys=tuple(api_key or ()),
        admin_keys=tuple(admin_key or ()),
        no_auth=no_auth,
        device=device,
        threads=threads,
        engine_process=engine_process,
        fast_batches=fast_batches,
        exact=cpu_exact,
        context=context,
        kv_tokens=kv_tokens,
        tensor_parallel=tensor_parallel,
        memory_bytes=None if memory is None else int(memory * GIGABYTE),
        max_concurrent=max_concurrent,
        max_concurrent_per_key=max_concurrent,
        engine=EngineConfig(max_waiting=max_waiting),
    )
    serve_models(models or (), settings, ui, Console(as_json))
