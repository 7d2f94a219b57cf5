"""The command line: one function per command, a module per lane. Above it, nothing; below it, all lanes.

Every command imports what it needs when it runs, so `quantmill --help` loads no torch.
"""

from __future__ import annotations

import sys

from quantmill.cli import benching, converting, making, measuring, running, serving, travelling
from quantmill.cli.app import app
from quantmill.cli.making import choose_variants
from quantmill.errors import QuantmillError

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
    """Entry point: a user's mistake is one line and exit 2, our own failure exit 1."""
    try:
        app()
    except QuantmillError as e:
        print(f"quantmill: {e}", file=sys.stderr)
        sys.exit(e.exit_code)
    except KeyboardInterrupt:
        print("quantmill: interrupted (quantize goes on with --resume)", file=sys.stderr)
        sys.exit(130)
