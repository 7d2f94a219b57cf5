"""`quantmill generate` and `chat`: from what the user typed to a model that is ready to run."""

from __future__ import annotations

from quantmill.console import Console
from quantmill.runtime.interface import Runtime
from quantmill.runtime.opening import open_runtime
from quantmill.runtime.tokenizer import TextTokenizer, open_tokenizer
from quantmill.sources import resolve


def open_model(
    model: str,
    device: str,
    threads: int | None,
    console: Console,
    *,
    exact: bool = False,
    context: int | None = None,
) -> tuple[Runtime, TextTokenizer]:
    """Runtime and tokenizer of one revision; says which runtime."""
    folder = resolve(model, notify=console.note, run=True)
    tokenizer = open_tokenizer(folder)
    runtime = open_runtime(folder, device=device, threads=threads, exact=exact, context=context)
    console.note(f"{folder.name}: {runtime.facts.name}")
    return runtime, tokenizer
