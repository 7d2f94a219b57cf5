"""Events as lines of JSON."""

from __future__ import annotations

import json
from pathlib import Path

from quantmill.commands.eventlog import also_to, event_to_json
from quantmill.quantize.job import BlockFinished, Event, Finished, ModuleSolved, RunStarted
from quantmill.types import ModuleReport

REPORT = ModuleReport("model.layers.0.mlp.up_proj", 0.002, 0.1, 64, 0.5)
EVENTS: tuple[Event, ...] = (
    RunStarted(2, 7, ("main",)),
    ModuleSolved("main", REPORT),
    BlockFinished("main", 0, False),
    Finished("main", Path("made/main"), 123, (REPORT,), 4.0),
)


def test_every_event_becomes_a_line_and_still_reaches_the_follower(tmp_path: Path) -> None:
    seen: list[Event] = []
    file = tmp_path / "new" / "events.jsonl"
    with also_to(file, seen.append) as follow:
        for event in EVENTS:
            follow(event)
            assert len(file.read_text().splitlines()) == len(seen)  # flushed at once
    assert tuple(seen) == EVENTS
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["started", "solved", "block", "finished"]
    assert lines == [event_to_json(e) for e in EVENTS]
    assert lines[1]["loss"] == 0.002


def test_without_a_file_the_follower_is_alone() -> None:
    seen: list[Event] = []
    with also_to(None, seen.append) as follow:
        follow(EVENTS[0])
    assert seen == [EVENTS[0]]
