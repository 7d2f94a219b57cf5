"""What can be picked, and fetching it."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quantmill.errors import BadCheckpoint, BadRequest
from quantmill.serve.ui import shelf
from quantmill.types import QuantConfig


def test_parameters_are_read_from_the_folder(tiny_branch: Path) -> None:
    found = shelf.read_parameters(tiny_branch)
    assert found.config is not None
    assert (found.config.bits, found.config.group_size) == (4, 128)
    rows = dict(found.rows())
    assert rows["bits"] == "4"
    assert rows["type"] == "llama"
    assert "perplexity" not in rows  # nothing was measured


def test_measured_loss_is_shown_where_there_is_any() -> None:
    rows = dict(shelf.Parameters("llama", QuantConfig(8, -1), 10**9, 0.0006, 23.5).rows())
    assert rows["group size"] == "one per row"
    assert rows["KL to the original"] == "0.0006 nats/token"


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint):
        shelf.read_parameters(tmp_path)


@pytest.mark.parametrize("asked", ["", "name", "a/b/c", "../x", "a/b c", "/a"])
def test_only_repositories_are_downloaded(asked: str) -> None:
    with pytest.raises(BadRequest, match="owner/name"):
        shelf.Download(asked)


@pytest.fixture
def slow_hub(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """A fetch of 100 bytes that reports one at a time while the event is clear."""
    from quantmill.hub import download

    go = threading.Event()

    def fetch(plan: Any, api: Any, advance: Any) -> Path:
        for _ in range(100):
            advance(1)
            go.wait(0.01)
        return Path("there")

    monkeypatch.setattr(download, "plan", lambda *_: SimpleNamespace(left=100))
    monkeypatch.setattr(download, "fetch", fetch)
    return go


def test_a_download_tells_how_far_it_is_and_where_it_ended(slow_hub: threading.Event) -> None:
    slow_hub.set()
    reports = list(shelf.Download("owner/name").run(every=0.01))
    assert reports[-1] == shelf.Fetching(100, 100, Path("there"))
    done = [r.done for r in reports]
    assert done == sorted(done)


def test_a_cancelled_download_stops(slow_hub: threading.Event) -> None:
    job = shelf.Download("owner/name:branch")
    reports = job.run(every=0.01)
    next(reports)
    job.cancel()
    with pytest.raises(shelf.Stopped):
        list(reports)
