"""`quantmill convert`: a quantised folder -> another container, with progress."""

from __future__ import annotations

from pathlib import Path

from quantmill.checkpoint import open_checkpoint
from quantmill.console import Console, gigabytes, progress
from quantmill.convert import Converted, convert
from quantmill.convert.folders import FOLDERS
from quantmill.errors import BadRequest
from quantmill.sources import resolve


def change(model: str, to: str, out: Path, console: Console) -> Converted:
    """Convert and say what came out. Raises what `convert` raises, BadRequest where `out` holds another model."""
    folder = resolve(model, notify=console.note, run=True)
    _refuse_another(out, to)
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


def _refuse_another(out: Path, to: str) -> None:
    """What was converted before may be converted anew; what else lies there may be all there is of it."""
    if to not in FOLDERS or not (out / "config.json").is_file():
        return
    there = open_checkpoint(out)
    if not there.quantized_modules() or there.layout != to.removesuffix("_v2"):
        raise BadRequest(
            f"{out} holds a model already, and not as {to}: give another --out, or remove it first"
        )
