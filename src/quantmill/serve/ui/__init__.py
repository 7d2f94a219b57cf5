"""The web UI, on the same server as the API. Gradio is imported only when it is asked for."""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from quantmill.errors import BadRequest

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from quantmill.serve.models import ModelService
    from quantmill.serve.settings import ServeSettings
    from quantmill.serve.ui.desk import Desk

PATH = "/ui"


def mount(app: Starlette, service: ModelService) -> None:
    """Put the page over a server's models under /ui. Raises BadRequest where gradio is not installed."""
    from quantmill.serve.ui.live import LiveDesk

    settings = app.state.server.settings
    put(app, LiveDesk(service, settings), settings)


def put(app: Starlette, desk: Desk, settings: ServeSettings) -> None:
    """Put the page over any desk under /ui. Where the server has keys, one is the password: an admin's, where there
    are such, because the page loads models and runs jobs."""
    try:
        import gradio as gr
    except ModuleNotFoundError:
        raise BadRequest("the web UI needs gradio: pip install 'quantmill[ui]', or leave --ui out") from None
    from quantmill.serve.ui.page import CSS, build, theme

    blocks = build(desk)
    blocks.queue(default_concurrency_limit=8)
    keys = settings.admin_keys or settings.api_keys
    said = f"any name; the password is the server's {'admin' if settings.admin_keys else 'API'} key"
    gr.mount_gradio_app(
        app,
        blocks,
        path=PATH,
        theme=theme(),
        css=CSS,
        ssr_mode=False,
        auth=(lambda _, password: _is_key(password, keys)) if keys else None,
        auth_message=said if keys else None,
    )
    app.router.routes += [Route(path, _to_the_page) for path in ("/", "/favicon.ico")]


async def _to_the_page(request: Request) -> Response:
    """Who types the address alone wants the page, and browsers look for its icon there."""
    return RedirectResponse(PATH + request.url.path)


def _is_key(password: str, keys: tuple[str, ...]) -> bool:
    """Every key is compared, so that the time it takes tells nothing."""
    right = [hmac.compare_digest(password.encode(), key.encode()) for key in keys]
    return any(right)
