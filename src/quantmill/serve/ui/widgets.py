"""Pieces of page that several tabs share: the sampling sliders, error messages, text out of chat messages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import gradio as gr

from quantmill.errors import BadRequest, QuantmillError
from quantmill.serve.ui.desk import Loaded, Message, Spoken
from quantmill.serve.ui.store import PRESETS, SAMPLING_FIELDS
from quantmill.types import SamplingParams


@dataclass(frozen=True, slots=True)
class Slider:
    """One sampling parameter on the page."""

    name: str
    label: str
    low: float
    high: float
    step: float
    info: str


SLIDERS = (
    Slider("temperature", "Temperature", 0, 2, 0.01, "0: always the likeliest token"),
    Slider("top_p", "Top p", 0.01, 1, 0.01, "keep the likeliest tokens up to this share"),
    Slider("top_k", "Top k", 0, 200, 1, "keep this many; 0: off"),
    Slider("min_p", "Min p", 0, 1, 0.01, "drop tokens below this share of the best; 0: off"),
    Slider("typical_p", "Typical p", 0.01, 1, 0.01, "locally typical sampling; 1: off"),
    Slider("repetition_penalty", "Repetition penalty", 0.5, 2, 0.01, "1: off"),
    Slider("presence_penalty", "Presence penalty", -2, 2, 0.05, "0: off"),
    Slider("frequency_penalty", "Frequency penalty", -2, 2, 0.05, "0: off"),
    Slider("max_new_tokens", "Longest answer (tokens)", 1, 4096, 1, ""),
)
WHOLE = ("top_k", "max_new_tokens")


def sampling_widgets() -> list[Any]:
    """A preset chooser over one slider per parameter, and a seed; returned in the order of SAMPLING_FIELDS."""
    preset = gr.Dropdown(["", *PRESETS], value="", label="Preset", elem_id="preset")
    first = SamplingParams()
    sliders = {
        s.name: gr.Slider(
            s.low,
            s.high,
            value=getattr(first, s.name),
            step=s.step,
            label=s.label,
            info=s.info,
            elem_id=f"sampling-{s.name}",
        )
        for s in SLIDERS
    }
    seed = gr.Textbox("", label="Seed", info="empty: another answer every time", elem_id="sampling-seed")
    widgets = [*(sliders[n] for n in SAMPLING_FIELDS if n != "seed"), seed]
    preset.input(_of_preset, preset, widgets, show_progress="hidden")
    return widgets


def _of_preset(name: str) -> list[Any]:
    return sampling_values(PRESETS[name]) if name in PRESETS else [gr.skip()] * len(SAMPLING_FIELDS)


def sampling_values(params: SamplingParams) -> list[Any]:
    """The widgets' values for these parameters."""
    values = [getattr(params, name) for name in SAMPLING_FIELDS]
    return [*values[:-1], "" if params.seed is None else str(params.seed)]


def sampling_params(values: Sequence[Any]) -> SamplingParams:
    """The parameters that the widgets show. Raises BadRequest."""
    named = dict(zip(SAMPLING_FIELDS, values, strict=True))
    seed = str(named.pop("seed") or "").strip()
    if seed and not seed.lstrip("-").isdigit():
        raise BadRequest(f"seed is {seed!r}; use a whole number, or leave it empty")
    numbers = {k: int(v) if k in WHOLE else float(v) for k, v in named.items()}
    return SamplingParams(**numbers, seed=int(seed) if seed else None)  # type: ignore[arg-type]


@contextmanager
def told() -> Iterator[None]:
    """Our errors as a message on the page; the page goes on."""
    try:
        yield
    except QuantmillError as error:
        raise gr.Error(str(error), duration=15, print_exception=False) from None


def plain(messages: Sequence[Any] | None) -> list[Message]:
    """Chat messages as the page holds them -> role and text, nothing else."""
    return [{"role": str(m["role"]), "content": _text(m["content"])} for m in messages or ()]


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    return "".join(str(p.get("text", "")) if isinstance(p, dict) else str(p) for p in parts)


def speed_line(spoken: Spoken) -> str:
    cut = "" if spoken.finish == "stop" else f" · {ENDINGS.get(spoken.finish, spoken.finish)}"
    return f"{spoken.prompt_tokens} + {spoken.completion_tokens} tokens · {spoken.tok_s:.1f} tok/s{cut}"


ENDINGS = {"length": "cut at the longest answer", "aborted": "stopped"}


def loaded_names(loaded: Sequence[Loaded]) -> list[str]:
    return [m.name for m in loaded]
