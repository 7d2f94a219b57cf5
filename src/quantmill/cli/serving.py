"""`serve`: models for programs and people."""

from __future__ import annotations

from quantmill.cli.app import app
from quantmill.cli.options import (
    AdminKeys,
    ApiKeys,
    AsJson,
    Context,
    CpuExact,
    Device,
    EngineProcess,
    FastBatches,
    Host,
    KvTokens,
    MaxConcurrent,
    MaxWaiting,
    Memory,
    NoAuth,
    Port,
    Served,
    TensorParallel,
    Threads,
    WebUi,
)
from quantmill.console import Console

GIGABYTE = 1_000_000_000


@app.command()
def serve(
    models: Served = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: ApiKeys = None,
    admin_key: AdminKeys = None,
    no_auth: NoAuth = False,
    ui: WebUi = False,
    context: Context = None,
    kv_tokens: KvTokens = None,
    memory: Memory = None,
    max_waiting: MaxWaiting = 256,
    max_concurrent: MaxConcurrent = 256,
    engine_process: EngineProcess = None,
    fast_batches: FastBatches = False,
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
    serve_models(models or (), settings, Console(as_json), ui=ui)
