"""The application that the commands register with."""

from __future__ import annotations

from typing import Annotated

import typer

from quantmill import __version__

app = typer.Typer(
    name="quantmill",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _show_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="print it, and stop")
    ] = False,
) -> None:
    """Make, check, publish, fetch and run GPTQ-quantised language models."""
