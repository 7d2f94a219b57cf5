"""A rank other than the first: `python -m quantmill.runtime.parallel.worker`, started by runtime.py.

Reads lines of JSON: what to open, then passes to run with the first rank. Ends when its input does.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from quantmill.errors import BadRequest, QuantmillError
from quantmill.runtime.parallel.messages import pieces_from
from quantmill.runtime.parallel.opening import Asked, open_part
from quantmill.runtime.parallel.team import RankLost

GRACE = 10.0  # seconds for a pass to end after the first rank has gone; it may wait for it on a GPU for ever


def main() -> None:
    """Serve until the input ends; an error of ours is one line."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all: the first rank decides
    lines = _lines()
    try:
        runtime = open_part(Asked(**next(lines)))
        for line in lines:
            pieces = pieces_from(line["pieces"])
            with contextlib.suppress(BadRequest):  # the first rank refuses it, too, and tells its caller
                runtime.hidden(pieces) if line["hidden"] else runtime.forward(pieces)
    except RankLost:  # the first rank says so
        sys.exit(RankLost.exit_code)
    except QuantmillError as error:
        print(f"quantmill: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


def _lines() -> Iterator[dict[str, Any]]:
    """Lines of the input, read by a thread of its own so that its end is noticed during a pass, too."""
    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin.buffer:
            inbox.put(line)
        inbox.put(b"")
        threading.Event().wait(GRACE)
        os._exit(1)

    threading.Thread(target=read, daemon=True).start()
    while line := inbox.get():
        yield json.loads(line)


if __name__ == "__main__":
    main()
