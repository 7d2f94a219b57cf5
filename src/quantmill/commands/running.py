"""`quantmill generate` and `chat`: from what the user typed to a loaded model."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quantmill.commands.machine import pick_device, set_threads
from quantmill.console import Console
from quantmill.runtime.load import load_model, load_tokenizer
from quantmill.sources import resolve


def open_model(
    model: str, device: str, threads: int | None, console: Console
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of one revision."""
    set_threads(threads)
    folder = resolve(model, notify=console.note)
    return load_model(folder, device=pick_device(device)), load_tokenizer(folder)
