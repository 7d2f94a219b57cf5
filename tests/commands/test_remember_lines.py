"""The line history of `quantmill chat`."""

from __future__ import annotations

import atexit
from pathlib import Path

import pytest

from quantmill.commands import running

readline = pytest.importorskip("readline", reason="this Python has no readline")


def test_lines_are_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTMILL_HOME", str(tmp_path / "home"))
    later = []
    monkeypatch.setattr(atexit, "register", lambda *call: later.append(call))
    readline.clear_history()
    running.remember_lines()
    readline.add_history("what is the capital of France?")
    ((write, file),) = later
    write(file)
    readline.clear_history()
    running.remember_lines()
    assert readline.get_history_item(1) == "what is the capital of France?"
    readline.clear_history()
