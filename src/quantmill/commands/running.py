"""`quantmill generate` and `chat`: from what the user typed to a model that is ready to run."""

from __future__ import annotations

import atexit
import contextlib
from pathlib import Path

from quantmill.console import Console
from quantmill.files import cache_root
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
    tensor_parallel: int = 1,
) -> tuple[Runtime, TextTokenizer]:
    """Runtime and tokenizer of one revision; says which runtime."""
    folder = resolve(model, notify=console.note, run=True)
    tokenizer = open_tokenizer(folder)
    runtime = open_runtime(
        folder,
        device=device,
        threads=threads,
        exact=exact,
        context=context,
        tensor_parallel=tensor_parallel,
    )
    console.note(f"{folder.name}: {runtime.facts.name}")
    return runtime, tokenizer


def remember_lines() -> None:
    """Let what is typed at a prompt be edited and found again, also the next time; nothing where there is no
    readline (Windows)."""
    try:
        import readline
    except ImportError:
        return
    file = cache_root() / "chat_history"
    file.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError):  # none yet, or not ours to read
        readline.read_history_file(file)
    readline.set_history_length(1000)
    atexit.register(_write_history, file)


def _write_history(file: Path) -> None:
    import readline

    with contextlib.suppress(OSError):  # a read-only home is no reason to fail at the very end
        readline.write_history_file(file)
