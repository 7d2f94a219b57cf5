"""The web UI, on the same server as the API. Gradio is imported only when it is asked for."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from quantmill.errors import BadRequest

if TYPE_CHECKING:
    from quantmill.serve.ui.desk import Desk

PATH = "/ui"


def mount(app: Any, desk: Desk) -> Any:
    """Put the page under /ui of an ASGI app. Raises BadRequest where gradio is not installed."""
    if importlib.util.find_spec("gradio") is None:
        raise BadRequest("the web UI needs gradio: pip install 'quantmill[ui]', or leave --ui out")
    import gradio as gr

    from quantmill.serve.ui.page import CSS, build, theme

    blocks = build(desk)
    blocks.queue(default_concurrency_limit=8)
    return gr.mount_gradio_app(app, blocks, path=PATH, theme=theme(), css=CSS, ssr_mode=False)
