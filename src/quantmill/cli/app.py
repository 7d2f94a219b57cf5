"""The application that the commands register with."""

from __future__ import annotations

import typer

app = typer.Typer(
    name="quantmill",
    help="Make, check, publish, fetch and run GPTQ-quantised language models.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)
