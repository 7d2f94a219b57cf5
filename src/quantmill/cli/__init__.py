"""The command line: one function per command, a module per lane. Above it, nothing; below it, all lanes.

Every command imports what it needs when it runs, so `quantmill --help` loads no torch.
"""

from __future__ import annotations

import sys
from typing import NoReturn

import typer

from quantmill.cli import benching, converting, making, measuring, mistakes, running, serving, travelling
from quantmill.cli.app import app
from quantmill.cli.making import choose_variants
from quantmill.errors import QuantmillError

INTERRUPTED = 130  # 128 + SIGINT, as shells count

# The modules' names are in the order of the help.
__all__ = [
    "app",
    "benching",
    "choose_variants",
    "converting",
    "main",
    "making",
    "measuring",
    "running",
    "serving",
    "travelling",
]


def main() -> None:
    """Entry point: a user's mistake is one line and exit 2, our own failure exit 1, Ctrl-C 130."""
    try:
        status = app(standalone_mode=False)
    except QuantmillError as e:
        _end(f"quantmill: {e}", e.exit_code)
    except mistakes.UsageError as e:
        _end(mistakes.usage_line(e), 2)
    except (KeyboardInterrupt, typer.Abort):
        _end(mistakes.interrupted_line(), INTERRUPTED)
    except OSError as e:
        line = mistakes.system_line(e)
        if line is None:
            raise
        _end(line, 2)
    if status == INTERRUPTED:  # so says Typer of Ctrl-C
        _end(mistakes.interrupted_line(), INTERRUPTED)
    sys.exit(status or 0)


def _end(line: str, status: int) -> NoReturn:
    print(line, file=sys.stderr)
    sys.exit(status)
