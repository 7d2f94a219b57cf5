"""`quantmill convert`: a quantised folder -> another container, with progress."""

from __future__ import annotations

from pathlib import Path

from quantmill.checkpoint import open_checkpoint
from quantmill.console import Console, gigabytes, progress
from quantmill.convert import Converted, convert
from quantmill.sources import resolve


def change(model: str, to: str, out: Path, console: Console) -> Converted:
    """Convert and say what came out. Raises what `convert` raises."""
    folder = resolve(model, notify=console.note, run=True)
    with progress("converting", len(open_checkpoint(folder).quantized_modules())) as advance:
        converted = convert(folder, to, out, advance)
    console.say(
        f"{converted.path}: {converted.modules} linears repacked as {to}, {gigabytes(converted.size_bytes)}"
    )
    for note in converted.notes:
        console.say(f"not exact: {note}")
    if not converted.notes:
        console.say("every quantised weight is bit for bit what it was")
    return converted
