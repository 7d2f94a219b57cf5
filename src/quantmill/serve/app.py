"""All endpoints as one application. Knows no socket: server.py serves it, and tests call it directly.

A web UI is mounted beside the API: `create_app(service, settings)` and then `app.mount("/ui", ...)`; it gets the
same `service` object, whose methods are what it needs.
"""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quantmill.errors import QuantmillError
from quantmill.serve import endpoints
from quantmill.serve.access import Access
from quantmill.serve.chat import chat_completions
from quantmill.serve.completions import completions
from quantmill.serve.exchange import Server
from quantmill.serve.metrics import Metrics
from quantmill.serve.models import ModelService
from quantmill.serve.refusal import Refusal, of
from quantmill.serve.settings import ServeSettings

ROUTES = (
    ("POST", "/v1/chat/completions", chat_completions),
    ("POST", "/v1/completions", completions),
    ("POST", "/v1/embeddings", endpoints.embeddings),
    ("GET", "/v1/models", endpoints.models),
    ("GET", "/v1/models/{name:path}", endpoints.model),
    ("POST", "/tokenize", endpoints.tokenize),
    ("POST", "/detokenize", endpoints.detokenize),
    ("POST", "/admin/models/load", endpoints.load_model),
    ("POST", "/admin/models/unload", endpoints.unload_model),
    ("GET", "/health", endpoints.health),
    ("GET", "/metrics", endpoints.metrics),
)


def create_app(service: ModelService, settings: ServeSettings | None = None) -> Starlette:
    """The API over a service's models."""
    settings = settings or ServeSettings()
    server = Server(settings, service, Access(settings), Metrics(service))
    routes = [Route(path, handler, methods=[method]) for method, path, handler in ROUTES]
    handlers = {Refusal: _refused, QuantmillError: _failed, HTTPException: _no_such_path}
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.add_middleware(_Guarded, server=server)
    app.add_middleware(_Counted, server=server)
    app.state.server = server
    return app


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return error.response()


async def _failed(request: Request, error: Exception) -> Response:
    assert isinstance(error, QuantmillError)
    return of(error).response()


async def _no_such_path(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"there is no {request.method} {request.url.path[:200]} here"
    return Refusal(error.status_code, what, code="unknown_url").response()


class _Guarded:
    """What is mounted beside the API, a web UI, is refused to other sites, as the API is."""

    def __init__(self, app: ASGIApp, server: Server) -> None:
        self.app, self.server = app, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self.server.access.refuse_strange_hosts(Request(scope))
            except Refusal as refusal:
                await refusal.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)


class _Counted:
    """Counts answers by path and status. Paths that are not in the table count as one."""

    def __init__(self, app: ASGIApp, server: Server) -> None:
        self.app, self.server = app, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                known = scope["path"] if any(scope["path"] == path for _, path, _ in ROUTES) else "other"
                self.server.metrics.requests.labels(known, message["status"]).inc()
            await send(message)

        await self.app(scope, receive, counted)
