"""The page: four tabs, one look, light and dark, on a laptop and on a phone."""

from __future__ import annotations

from typing import Any

import gradio as gr

from quantmill.serve.ui import chat_tab, compare_tab, model_tab, quantise_tab
from quantmill.serve.ui.desk import Desk, Room
from quantmill.serve.ui.jobs import Run
from quantmill.serve.ui.shelf import choices
from quantmill.serve.ui.store import Store

TITLE = "quantmill"
CSS = """
.gradio-container main { width: 100% !important; max-width: 1280px !important; margin: 0 auto !important; }
#said textarea { font-size: 1rem; }
#prompt-text .cm-content, #remarks .cm-content { white-space: pre-wrap; }
@media (max-width: 640px) { .gradio-container { padding: 6px !important; } }
"""


def theme() -> Any:
    """System fonts: nothing is fetched from elsewhere, the page works without a network."""
    fonts = ("system-ui", "sans-serif")
    mono = ("ui-monospace", "monospace")
    return gr.themes.Default(primary_hue="teal", neutral_hue="slate", font=fonts, font_mono=mono)


def build(
    desk: Desk, store: Store | None = None, run: Run | None = None
) -> Any:  # gr.Blocks, which has no types
    """The whole page."""
    room = Room(desk, store or Store())
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as blocks:
        gr.Markdown("# quantmill", elem_id="title")
        with gr.Tabs(selected="model"):
            # The chat's widgets are made first, because the tab Model writes to them; they are shown second.
            with gr.Tab("Text generation", id="talk", render=False) as talk_tab:
                talk = chat_tab.build(room)
            with gr.Tab("Model", id="model"):
                pick = model_tab.build(room, talk)
            talk_tab.render()
            with gr.Tab("Quantise", id="quantise"):
                quantise_tab.build(run or Run())
            with gr.Tab("Compare", id="compare"):
                sides = compare_tab.build(room)

        def opened() -> list[Any]:
            """What has changed since the page was built."""
            names = choices(desk.known())
            lists = [gr.update(choices=names) for _ in (pick, *sides)]
            return [*lists, chat_tab.refresh(room), chat_tab.conversations(room)]

        blocks.load(opened, None, [pick, *sides, talk.model, talk.rooms], show_progress="hidden")
    return blocks
