"""A quantising run beside the server."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from desks import wait_for

from quantmill.errors import BadRequest
from quantmill.serve.ui.jobs import Form, Run

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 300


@pytest.fixture
def form(tiny_llama: Path, tmp_path: Path) -> Form:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    return Form(str(tiny_llama), str(tmp_path / "made"), ("4bit-32g",), str(text), 4, 32, "fast")


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("source", "", "Source is empty"),
        ("out", "-x", "dash"),
        ("variants", (), "no variant"),
        ("dataset", " ", "empty"),
    ],
)
def test_a_form_with_a_gap_is_refused(form: Form, field: str, value: object, said: str) -> None:
    with pytest.raises(BadRequest, match=said):
        replace(form, **{field: value}).arguments()


def test_a_run_is_followed_to_its_end(form: Form, tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert run.progress().state == "idle"
    run.start(form)
    with pytest.raises(BadRequest, match="stop it first"):
        run.start(form)
    wait_for(lambda: not run.running, 240)
    end = run.progress()
    assert (end.state, end.done) == ("finished", end.total), end.remarks
    assert end.finished[0][0] == "gptq-4bit-32g-actorder_True"
    assert {linear for _, _, linear, _ in end.losses} >= {"q_proj", "down_proj"}


def test_a_run_that_cannot_start_says_why(form: Form, tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.start(replace(form, source=str(tmp_path / "nowhere")))
    wait_for(lambda: not run.running, 120)
    wait_for(lambda: "nowhere" in run.progress().remarks)
    assert run.progress().state == "failed"


def test_a_stopped_run_goes_on_from_its_last_event(form: Form, tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.start(replace(form, variants=("4bit-32g", "8bit-32g")))
    wait_for(lambda: len(run.progress().losses) > 7, 240)  # a block is done
    run.stop()
    assert run.progress().state == "stopped"
    run.start(replace(form, variants=("4bit-32g", "8bit-32g")), resume=True)
    wait_for(lambda: not run.running, 240)
    end = run.progress()
    assert (end.state, len(end.finished)) == ("finished", 2), end.remarks
    assert len(end.losses) == 2 * 2 * 7  # those of the first run, too
    run.start(replace(form, variants=("4bit-32g",)), resume=True)  # another form: nothing is known of it
    wait_for(lambda: not run.running, 240)
    assert not run.progress().losses


def test_half_a_line_of_the_events_file_is_left_for_later(tmp_path: Path) -> None:
    from quantmill.serve.ui.jobs import _read

    file = tmp_path / "events"
    file.write_text(json.dumps({"event": "started"}) + '\n{"event": "sol')
    assert _read(file) == [{"event": "started"}]
