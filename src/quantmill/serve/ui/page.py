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
footer { display: none !important; }  /* gradio's own: its API is not ours */
/* Tables of facts: quiet lines, the whole width. */
.prose table { width: 100%; border-collapse: collapse; margin: 4px 0; border: 0 !important; }
.prose table tr { border: 0 !important; }
.prose table th, .prose table td {
  border: 0 !important; border-bottom: 1px solid var(--border-color-primary) !important;
  padding: 5px 10px !important; font-weight: 400; text-align: left;
}
.prose table td:first-child, .prose table th:first-child { color: var(--body-text-color-subdued); width: 40%; }
/* Lists of branches and plans: one line each, they scroll sideways where there is no room. */
#branches, #plan-table { --font-mono: var(--font); }
:is(#branches, #plan-table) :is(td, th, [role="gridcell"], [role="columnheader"]) { font-size: 12px !important; }
:is(#branches, #plan-table) :is(td, th, [role="gridcell"], [role="columnheader"]) * { font-size: 12px !important; }
#branches td, #branches th, #plan-table td, #plan-table th { white-space: nowrap; word-break: keep-all; }
#branches th *, #plan-table th * { white-space: nowrap; word-break: keep-all; overflow-wrap: normal; }
/* What ends something is there when it is looked for, and is not the loudest on the page. */
button.stop {
  background: transparent !important; color: var(--error-text-color) !important;
  border: 0 !important; box-shadow: inset 0 0 0 1px var(--error-border-color) !important;
}
#conversations input { padding-right: 28px; text-overflow: ellipsis; }
@media (max-width: 640px) {
  .gradio-container { padding: 6px !important; }
  .gradio-container main { padding: 4px !important; }
  #talk-side { order: 2; }  /* the conversation first, its settings below */
  #talk { height: 52vh !important; }
}
"""


def theme() -> Any:
    """System fonts: nothing is fetched from elsewhere, the page works without a network."""
    fonts = ("system-ui", "sans-serif")
    mono = ("ui-monospace", "monospace")
    made = gr.themes.Default(primary_hue="teal", neutral_hue="slate", font=fonts, font_mono=mono)
    quiet = "*neutral_500"  # on white 4.8 : 1; gradio's own is too pale to be read easily
    return made.set(
        body_text_color_subdued=quiet,
        block_info_text_color=quiet,
        input_placeholder_color=quiet,
        body_text_color_subdued_dark="*neutral_400",
        block_info_text_color_dark="*neutral_400",
        input_placeholder_color_dark="*neutral_400",
    )


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
                pick, status = model_tab.build(room, talk)
            talk_tab.render()
            with gr.Tab("Quantise", id="quantise"):
                quantise_tab.build(run or Run())
            with gr.Tab("Compare", id="compare"):
                sides = compare_tab.build(room)

        def opened() -> list[Any]:
            """What has changed since the page was built."""
            names = choices(desk.known())
            lists = [gr.update(choices=names)] * len(sides)  # somebody may have picked some meanwhile
            return [*model_tab.now(room, names), *lists, chat_tab.refresh(room), chat_tab.conversations(room)]

        blocks.load(opened, None, [pick, status, *sides, talk.model, talk.rooms], show_progress="hidden")
    return blocks
