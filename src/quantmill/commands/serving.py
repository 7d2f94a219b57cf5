"""`quantmill serve`: from what the user typed to a server."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence

from quantmill.console import Console
from quantmill.errors import BadRequest
from quantmill.runtime.gpu.batches import BATCHES, FAST
from quantmill.serve.logs import log_to_stderr
from quantmill.serve.server import Mount, make_service, serve
from quantmill.serve.settings import ServeSettings


def serve_models(models: Sequence[str], settings: ServeSettings, console: Console, *, ui: bool) -> None:
    """Serve until a signal comes. The first model is loaded before the first request, the others when asked for."""
    mount = _ui() if ui else None
    if settings.fast_batches:
        os.environ[BATCHES] = FAST  # also read by the processes of engines and ranks
    service = make_service(models, settings)
    names = [info.name for info in service.infos()]
    log_to_stderr()

    def ready(address: str) -> None:
        console.say(f"serving {', '.join(names)} at {address}")
        if names:
            console.say(
                f"  OPENAI_BASE_URL={address}/v1 OPENAI_API_KEY={'KEY' if _keys(settings) else 'none'}"
            )
        if ui:
            console.say(f"  in a browser: {address}/ui")
        if not settings.loopback and settings.no_auth:
            console.note("there are no keys: whoever reaches this address may use it (--api-key)")
        console.document({"url": address, "models": names})

    serve(service, settings, load=names[:1], ready=ready, mount=mount)


def _keys(settings: ServeSettings) -> bool:
    return bool(settings.api_keys or settings.admin_keys)


def _ui() -> Mount:
    if importlib.util.find_spec("gradio") is None:
        raise BadRequest("the web UI needs gradio: pip install 'quantmill[ui]'")
    if importlib.util.find_spec("quantmill.serve.ui") is None:
        raise BadRequest("this version has no web UI: leave --ui out")
    mount: Mount = importlib.import_module("quantmill.serve.ui").mount
    return mount
