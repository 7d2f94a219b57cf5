"""The desk over the server's own models."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from quantmill.errors import BadRequest, UserError
from quantmill.serve.server import make_service
from quantmill.serve.settings import ServeSettings
from quantmill.serve.ui import _is_key
from quantmill.serve.ui.desk import Spoken
from quantmill.serve.ui.live import LiveDesk
from quantmill.serve.ui.store import ModelSettings
from quantmill.types import SamplingParams

PARAMS = SamplingParams(temperature=0, repetition_penalty=1.0, max_new_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def desk(tiny_branch: Path) -> Iterator[LiveDesk]:
    """A service of one tiny model, its event loop in a thread as in the server."""
    settings = ServeSettings(device="cpu", threads=1, kv_tokens=1024)
    service = make_service([f"tiny={tiny_branch}"], settings)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    service.loop = loop
    desk = LiveDesk(service, settings)
    desk.load("tiny", ModelSettings())
    yield desk
    asyncio.run_coroutine_threadsafe(service.close(), loop).result(60)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


def text_and_end(answer: object) -> tuple[str, Spoken]:
    *pieces, end = list(answer)  # type: ignore[call-overload]
    assert isinstance(end, Spoken)
    return "".join(pieces), end


def test_a_text_is_continued_and_counted(desk: LiveDesk) -> None:
    _, end = text_and_end(desk.go_on("tiny", "Once upon", PARAMS))
    assert (end.completion_tokens, end.finish) == (6, "length")
    assert end.prompt_tokens > 0
    assert end.tok_s > 0


def test_the_same_text_comes_out_twice(desk: LiveDesk) -> None:
    first, again = (text_and_end(desk.go_on("tiny", "Once upon", PARAMS))[0] for _ in range(2))
    assert first == again


def test_a_stopped_answer_ends_at_once(desk: LiveDesk) -> None:
    answer = desk.go_on("tiny", "Once upon", SamplingParams(max_new_tokens=900, ignore_eos=True))
    pieces = iter(answer)
    next(pieces)
    answer.stop()
    end = list(pieces)[-1]
    assert isinstance(end, Spoken)
    assert end.finish == "aborted"
    assert end.completion_tokens < 900


def test_other_settings_load_the_model_anew(desk: LiveDesk) -> None:
    assert desk.load("tiny", ModelSettings(context=128)).context == 128
    before = dict(desk.service.ready())["tiny"]
    desk.load("tiny", ModelSettings(context=128))
    assert dict(desk.service.ready())["tiny"] is before  # nothing has changed: nothing is done
    assert desk.load("tiny", ModelSettings()).context != 128


def test_an_unloaded_model_says_where_to_pick_it(desk: LiveDesk) -> None:
    desk.unload("tiny")
    assert not desk.loaded()
    with pytest.raises(BadRequest, match="tab Model"):
        desk.go_on("tiny", "x", PARAMS)
    desk.load("tiny", ModelSettings())


def test_a_model_that_is_not_there_is_told(desk: LiveDesk, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing-here"):
        desk.load(str(tmp_path / "nothing-here"), ModelSettings())


def test_the_server_s_keys_are_the_passwords() -> None:
    keys = ("first-key", "second-key")
    assert _is_key("second-key", keys)
    assert not _is_key("", keys)
    assert not _is_key("third-key", keys)
