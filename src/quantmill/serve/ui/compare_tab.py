"""The tab *Compare*: one prompt, two models side by side, with speed, memory and measured loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from quantmill.console import gigabytes
from quantmill.errors import BadRequest
from quantmill.serve.ui.desk import Answer, Loaded, Room, Spoken
from quantmill.serve.ui.shelf import choices, read_parameters
from quantmill.serve.ui.widgets import told
from quantmill.types import SamplingParams

SIDES = ("left", "right")


def build(room: Room) -> list[Any]:
    """Lay the tab out and wire it. Returns the two choosers, which a page load refreshes."""
    tab = _Compare(room)
    prompt = gr.Textbox(label="Prompt", lines=2, elem_id="compare-prompt")
    with gr.Row():
        longest = gr.Slider(
            1, 1024, value=128, step=1, label="Longest answer (tokens)", elem_id="compare-longest"
        )
        temperature = gr.Slider(0, 2, value=0, step=0.05, label="Temperature", info="0: greedy")
    with gr.Row():
        run = gr.Button("Compare", variant="primary", elem_id="compare-run", min_width=100)
        stop = gr.Button("Stop", variant="stop", elem_id="compare-stop", min_width=100)
    pickers, texts, facts = [], [], []
    names = choices(room.desk.known())
    with gr.Row():
        for side, first in zip(SIDES, first_two(names), strict=True):
            with gr.Column(min_width=320):
                pickers.append(gr.Dropdown(names, value=first, label="Model", elem_id=f"compare-{side}"))
                texts.append(
                    gr.Textbox(
                        lines=8,
                        max_lines=24,
                        label="Answer",
                        interactive=False,
                        elem_id=f"compare-text-{side}",
                    )
                )
                facts.append(gr.Markdown("", elem_id=f"compare-facts-{side}"))
    both = [texts[0], facts[0], texts[1], facts[1]]
    gr.on([run.click, prompt.submit], tab.run, [prompt, *pickers, longest, temperature], both)
    stop.click(tab.stop, None, None, queue=False)
    return pickers


def first_two(names: Sequence[str]) -> list[str | None]:
    """What the choosers stand on in a new page."""
    return [names[i] if len(names) >= len(SIDES) else None for i in range(len(SIDES))]


class _Compare:
    """The tab's handlers."""

    def __init__(self, room: Room) -> None:
        self.room = room
        self.running: dict[str, Answer] = {}  # by browser session
        self.stopping: set[str] = set()

    def stop(self, request: gr.Request) -> None:
        session = request.session_hash or ""
        self.stopping.add(session)
        answer = self.running.pop(session, None)
        if answer is not None:
            answer.stop()

    def run(
        self,
        request: gr.Request,
        prompt: str,
        left: str | None,
        right: str | None,
        longest: float,
        temperature: float,
    ) -> Iterator[list[Any]]:
        """One after the other, so that each has the whole machine and the speeds can be compared."""
        session = request.session_hash or ""
        self.stopping.discard(session)
        shown = ["", "", "", ""]
        with told():
            if not prompt.strip():
                raise BadRequest("the prompt is empty: write something that both are to answer")
            if not left or not right:
                raise BadRequest("two models are needed: pick one on each side")
            params = SamplingParams(
                temperature=temperature, repetition_penalty=1.0, max_new_tokens=int(longest), seed=0
            )
            for side, name in enumerate((left, right)):
                if session in self.stopping:
                    return
                for text, fact in self._one(session, name, prompt, params):
                    shown[2 * side : 2 * side + 2] = [text, fact]
                    yield list(shown)

    def _one(self, session: str, name: str, prompt: str, params: SamplingParams) -> Iterator[tuple[str, str]]:
        yield "", f"loading {name} …"
        model = self._loaded(name)
        if model.has_template:
            answer = self.room.desk.answer(name, [{"role": "user", "content": prompt}], params)
        else:
            answer = self.room.desk.go_on(name, prompt, params)
        self.running[session] = answer
        text, end = "", None
        try:
            for piece in answer:
                if isinstance(piece, Spoken):
                    end = piece
                else:
                    text += piece
                    yield text, "…"
        finally:
            answer.stop()
        yield text, _facts(model, end)

    def _loaded(self, name: str) -> Loaded:
        for model in self.room.desk.loaded():
            if model.name == name:
                return model
        return self.room.desk.load(name, self.room.store.settings(name))


def _facts(model: Loaded, end: Spoken | None) -> str:
    said = read_parameters(model.folder)
    kl = "not measured (`quantmill eval`)" if said.mean_kl is None else f"{said.mean_kl:.4f} nats/token"
    speed = f"{end.tok_s:.1f} tok/s" if end else "-"
    memory = f"{gigabytes(model.weight_bytes)} + {gigabytes(model.cache_bytes)} cache"
    return f"| speed | {speed} |\n|---|---|\n| memory | {memory} |\n| KL to the original | {kl} |"
