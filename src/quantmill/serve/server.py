"""A server in this process until a signal comes: socket, models, logs, and an end that cuts nobody off."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quantmill.errors import BadRequest, QuantmillError, UserError
from quantmill.runtime.llm import LLM
from quantmill.serve.app import create_app
from quantmill.serve.bandwidth import measure, on_gpu
from quantmill.serve.models import ModelService
from quantmill.serve.settings import ServeSettings
from quantmill.serve.warm import warm_up
from quantmill.types import SamplingParams

if TYPE_CHECKING:
    import uvicorn
    from starlette.applications import Starlette

log = logging.getLogger("quantmill.serve")
Mount = Callable[["Starlette", ModelService], None]  # adds a web UI, say
LAST_BYTES = 0.5  # seconds for them to be sent
SHARE = 0.8  # of the device's memory, for all models together


def make_service(models: Sequence[str], settings: ServeSettings) -> ModelService:
    """The models' names, nothing loaded. Raises BadRequest, SourceNotFound."""
    service = ModelService(
        lambda source: open_model(source, service.overrides.get(source, settings)), memory_budget(settings)
    )
    for typed in models:
        service.register(typed)
    return service


def open_model(source: str, settings: ServeSettings) -> tuple[Path, LLM]:
    """Blocking: fetched if need be, loaded, with a running engine."""
    from quantmill.sources import resolve

    folder = resolve(source, notify=log.info, run=True)
    llm = _open_somewhere(folder, settings)
    measure(llm.facts.name, settings.threads, llm.beside)
    if on_gpu(llm.facts.name):
        warm_up(llm)
        if not llm.engine.alive:  # of something that no client may ever ask for
            llm.close()
            llm = _open_somewhere(folder, settings)
    return folder, llm


def _open_somewhere(folder: Path, settings: ServeSettings) -> LLM:
    """With its engine where it is wanted, else inside the server."""
    try:
        return _open(folder, settings, _apart(settings))
    except UserError:
        raise
    except QuantmillError as error:  # only a process of its own ends like that
        log.warning("the engine runs inside the server", extra={"model": folder.name, "error": str(error)})
        return _open(folder, settings, False)


def _open(folder: Path, settings: ServeSettings, apart: bool) -> LLM:
    """The model, which has answered once: a process that cannot is found here, and not by a client."""
    llm = LLM(
        folder,
        apart=apart,
        device=settings.device,
        threads=settings.threads,
        exact=settings.exact,
        context=settings.context,
        kv_tokens=settings.kv_tokens,
        tensor_parallel=settings.tensor_parallel,
        engine=settings.engine,
    )
    if apart:
        try:
            llm.generate([[0]], SamplingParams(0.0, max_new_tokens=2, ignore_eos=True))
        except QuantmillError:
            llm.close()
            raise
    return llm


def _apart(settings: ServeSettings) -> bool:
    """Whether engines get processes of their own. A GPU's passes are so short that this server would hold them up;
    a processor's are long, and its cores have other things to do than to run one more interpreter."""
    if settings.engine_process is not None:
        return settings.engine_process
    from quantmill.runtime.opening import gpu_count

    on_gpu = settings.device.startswith("cuda") or (settings.device == "auto" and gpu_count() > 0)
    return on_gpu and not settings.exact and settings.tensor_parallel == 1  # those have processes already


def memory_budget(settings: ServeSettings) -> int:
    """Bytes for all models together: as set, or a share of the device's memory."""
    if settings.memory_bytes is not None:
        return settings.memory_bytes
    from quantmill.hub.machine import this_machine

    machine = this_machine()
    on_gpu = settings.device != "cpu" and machine.vram is not None
    vram = (machine.vram or 0) * settings.tensor_parallel
    return int(SHARE * (vram if on_gpu else machine.ram))


def serve(
    service: ModelService,
    settings: ServeSettings,
    *,
    load: Sequence[str] = (),
    ready: Callable[[str], None] | None = None,
    mount: Mount | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT: then no more connections, and answers under way may end.

    load: models that are loaded before the first request is taken; `ready` gets the address when it is. Raises
    BadRequest for an address that is taken, and what loading raises.
    """
    import uvicorn

    app = create_app(service, settings)
    if mount is not None:
        mount(app, service)
    with _listen(settings.host, settings.port) as listener:
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=max(1, int(settings.drain_seconds)),
            backlog=512,
            server_header=False,
        )
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        address = f"http://{host}:{listener.getsockname()[1]}"
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            runner.run(
                _live(
                    _server(config, service, lambda: ready(address) if ready else None),
                    service,
                    load,
                    listener,
                )
            )


async def _live(
    server: uvicorn.Server, service: ModelService, load: Sequence[str], listener: socket.socket
) -> None:
    service.loop = asyncio.get_running_loop()
    try:
        for name in load:
            await service.load(name)
        await server.serve(sockets=[listener])
    finally:
        await service.close()


def _server(config: uvicorn.Config, service: ModelService, started: Callable[[], None]) -> uvicorn.Server:
    """uvicorn's server, which says when it takes connections, and ends on a signal without dying of it."""
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets=sockets)
            started()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            watch = asyncio.create_task(self._until_nobody_waits())
            try:
                await super().shutdown(sockets=sockets)
            finally:
                watch.cancel()

        async def _until_nobody_waits(self) -> None:
            """A page that is open in a browser keeps a connection open; only answers are worth waiting for."""
            while any(info.users for info in service.infos()):
                await asyncio.sleep(0.1)
            await asyncio.sleep(LAST_BYTES)
            for connection in list(self.server_state.connections):
                if connection.transport is not None:
                    connection.transport.close()

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            if threading.current_thread() is not threading.main_thread():
                yield
                return
            numbers = (signal.SIGINT, signal.SIGTERM)
            before = {number: signal.signal(number, self.handle_exit) for number in numbers}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

    return Server(config)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise BadRequest(f"cannot listen on {host}:{port} ({error.strerror}): use another --port") from None
    return listener
