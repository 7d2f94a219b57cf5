"""A quantising run's events as JSON lines in a file, for programs that watch it (the web UI does)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quantmill.quantize.job import BlockFinished, Event, Finished, ModuleSolved, OnEvent, RunStarted
from quantmill.types import Json


def event_to_json(event: Event) -> Json:
    """One event; `event` says which kind it is."""
    match event:
        case RunStarted(blocks, modules, branches):
            return {
                "event": "started",
                "blocks": blocks,
                "modules_per_block": modules,
                "branches": list(branches),
            }
        case ModuleSolved(branch, report):
            facts = {"loss": report.loss, "seconds": report.seconds, "fallback": report.fallback}
            return {"event": "solved", "branch": branch, "module": report.name, **facts}
        case BlockFinished(branch, index, resumed):
            return {"event": "block", "branch": branch, "index": index, "resumed": resumed}
        case Finished(branch, folder, size):
            return {"event": "finished", "branch": branch, "folder": str(folder), "size_bytes": size}


@contextmanager
def also_to(file: Path | None, follower: OnEvent) -> Iterator[OnEvent]:
    """`follower`, and a line of JSON in `file` for every event, flushed at once; an older file is replaced."""
    if file is None:
        yield follower
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8") as stream:

        def both(event: Event) -> None:
            print(json.dumps(event_to_json(event)), file=stream, flush=True)
            follower(event)

        yield both
