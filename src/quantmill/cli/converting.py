"""`convert`: one quantised model, another container."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantmill.cli.app import app
from quantmill.cli.options import AsJson, Model
from quantmill.console import Console


@app.command()
def convert(
    model: Model,
    to: Annotated[
        str,
        typer.Option(help="gguf:Q4_0, gguf:Q4_1, gguf:Q8_0, gguf, awq, gptq, gptq_v2 or compressed-tensors"),
    ],
    out: Annotated[Path, typer.Option(help="a folder; for gguf also a file name that ends in .gguf")],
    as_json: AsJson = False,
) -> None:
    """Put a quantised model into another container without rounding it again; says what is not exact."""
    from quantmill.commands.converting import change

    console = Console(as_json)
    console.document(change(model, to, out, console).to_json())
