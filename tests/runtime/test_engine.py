"""The engine over the toy runtime: every answer is the one that the toy tells without any engine."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from quantmill.errors import Busy
from quantmill.runtime.engine import Engine
from quantmill.runtime.engine_types import (
    EngineConfig,
    Event,
    FinishEvent,
    Reason,
    Request,
)
from quantmill.runtime.interface import PAGE, Piece
from runtime.engine_runs import EAGER, WARM, answer, finish, nothing_held, prompt, run, with_seed
from toy_runtime import END, ToyRuntime, told


@pytest.mark.parametrize("size", [1, 2, 63, 64, 65, 127, 128, 129, 300])
def test_alone(size: int) -> None:
    toy = ToyRuntime(max_tokens=50)
    engine = Engine(toy)
    engine.add(Request("a", prompt(size), WARM))
    events = run(engine)
    assert answer(events, "a") == told(toy, prompt(size), WARM)
    assert finish(events, "a").reason is Reason.LENGTH
    assert finish(events, "a").completion_tokens == 30
    assert nothing_held(engine)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("pages", [200, 12])
def test_many_at_once_say_what_each_says_alone(pages: int, window: int | None) -> None:
    """With 12 pages answers are put aside again and again."""
    toy = ToyRuntime(pages, window=window, max_tokens=70, max_pieces=8)
    engine = Engine(toy, EAGER)
    rng = random.Random(1)
    requests = []
    for i in range(30):
        shared = prompt(100) if i % 3 == 0 else ()
        params = dataclasses.replace(
            WARM, seed=i, max_new_tokens=rng.choice((3, 40, 120)), ignore_eos=i % 2 == 0
        )
        requests.append(
            Request(f"r{i}", shared + prompt(rng.randrange(1, 200), i), params, client=f"c{i % 4}")
        )
    events: list[Event] = []
    for i, request in enumerate(requests):
        engine.add(request)
        if i % 5 == 4:
            events += engine.step()
    events += run(engine)
    for request in requests:
        assert answer(events, request.id) == told(toy, request.prompt, request.params), request.id
    assert nothing_held(engine)
    assert (engine.stats().preemptions > 0) == (pages == 12)
    assert engine.stats().cached_tokens > 0


def test_an_end_token_ends_and_is_counted_but_not_said() -> None:
    toy = ToyRuntime()
    params = dataclasses.replace(WARM, ignore_eos=False, max_new_tokens=400, logit_bias={END: 1.5})
    engine = Engine(toy)
    engine.add(Request("a", prompt(10), params))
    events = run(engine)
    said = answer(events, "a")
    assert said == told(toy, prompt(10), params)
    assert END not in said
    end = finish(events, "a")
    assert end.reason is Reason.STOP
    assert end.last is not None
    assert end.last.token == END
    assert end.completion_tokens == len(said) + 1


def test_stop_token_ids_end_too() -> None:
    toy = ToyRuntime()
    full = told(toy, prompt(10), WARM)
    engine = Engine(toy)
    engine.add(Request("a", prompt(10), dataclasses.replace(WARM, stop_token_ids=(full[5],))))
    events = run(engine)
    assert answer(events, "a") == full[: full.index(full[5])]
    assert finish(events, "a").reason is Reason.STOP


def test_a_prompt_is_computed_in_chunks_while_answers_go_on() -> None:
    toy = ToyRuntime(max_tokens=40)
    engine = Engine(toy, EAGER)
    engine.add(Request("a", prompt(5), dataclasses.replace(WARM, max_new_tokens=40)))
    engine.step()
    engine.add(Request("long", prompt(400), WARM))
    events: list[Event] = []
    while not answer(events, "long"):
        events += engine.step()
    assert len(answer(events, "a")) == 11  # one token in each of the passes that the prompt took
    assert toy.passes[1:11] == [[1, 39]] * 10


def test_prompts_can_be_cut_at_fixed_places_only() -> None:
    """For back ends whose bits depend on a piece's length: alone or not, the same pieces."""
    toy = ToyRuntime(200, max_tokens=300, max_pieces=6)
    engine = Engine(toy, EngineConfig(cut=128, pass_seconds=1e-9))
    begun: dict[int, list[int]] = {}
    forward = toy.forward

    def watched(pieces: Sequence[Piece]) -> np.ndarray:
        for p in pieces:
            if len(p.tokens) > 1:
                begun.setdefault(p.start % 128, []).append(len(p.tokens))
        return forward(pieces)

    toy.forward = watched  # type: ignore[method-assign]
    requests = [Request(f"{i}", prompt(100 + 97 * (i % 5), i % 7), with_seed(i)) for i in range(8)]
    for request in requests:
        engine.add(request)
    events = run(engine)
    for request in requests:
        assert answer(events, request.id) == told(toy, request.prompt, request.params)
    assert set(begun) == {0}
    assert set(begun[0]) <= {128, *(len(r.prompt) % 128 for r in requests)}
    again = Request("again", prompt(488, 4), with_seed(4))
    engine.add(again)
    events = run(engine)
    assert answer(events, "again") == told(toy, again.prompt, again.params)
    assert finish(events, "again").cached_tokens == 384  # 448 are there
    assert nothing_held(engine)
    little = Engine(ToyRuntime(12, max_tokens=300, max_pieces=6), EngineConfig(cut=128))
    for request in requests:
        little.add(request)
    events = run(little)
    for request in requests:
        assert answer(events, request.id) == told(toy, request.prompt, request.params)


@pytest.mark.parametrize(("by_row", "cut"), [(None, 0), (16, 512), (1, 512)])
def test_the_back_end_says_whether_cuts_matter(by_row: int | None, cut: int) -> None:
    assert Engine(ToyRuntime(max_tokens=2048, by_row=by_row)).scheduler.cut == cut


def test_a_cut_leaves_room_for_the_window_in_a_small_cache() -> None:
    toy = ToyRuntime(8, window=200, max_tokens=2048, by_row=16)
    engine = Engine(toy)
    assert engine.scheduler.cut == 3 * PAGE
    engine.add(Request("a", prompt(1000), WARM))
    assert len(answer(run(engine), "a")) == 30


def test_a_slow_prompt_leaves_room_for_answers() -> None:
    toy = ToyRuntime(max_tokens=200)
    engine = Engine(toy, EngineConfig(pass_seconds=1e-9))
    engine.add(Request("a", prompt(5), WARM))
    engine.step()
    engine.add(Request("b", prompt(100), WARM))
    run(engine)
    assert max(max(p) for p in toy.passes[1:]) <= 16


def test_short_prompts_overtake_a_long_one_and_it_still_ends() -> None:
    toy = ToyRuntime(max_tokens=64)
    engine = Engine(toy, EAGER)
    params = dataclasses.replace(WARM, max_new_tokens=1)
    engine.add(Request("long", prompt(640), params))
    engine.step()
    for i in range(6):
        engine.add(Request(f"s{i}", prompt(30, i), params))
    order = [e.request for e in run(engine) if isinstance(e, FinishEvent)]
    assert order[-1] == "long"
    assert len(toy.passes) <= 16


def test_clients_are_served_alike() -> None:
    toy = ToyRuntime(max_pieces=2)
    engine = Engine(toy, EAGER)
    params = dataclasses.replace(WARM, max_new_tokens=5)
    for i in range(20):
        engine.add(Request(f"greedy{i}", prompt(20, i), params, client="greedy"))
    engine.step()
    engine.add(Request("modest", prompt(20, 99), params, client="modest"))
    order = [e.request for e in run(engine) if isinstance(e, FinishEvent)]
    assert order.index("modest") <= 3


def test_the_line_is_bounded() -> None:
    toy = ToyRuntime(max_pieces=1)
    engine = Engine(toy, EngineConfig(max_waiting=2))
    engine.add(Request("a", prompt(5), WARM))
    engine.step()
    engine.add(Request("b", prompt(5), WARM))
    engine.add(Request("c", prompt(5), WARM))
    with pytest.raises(Busy, match="2 requests are waiting") as refused:
        engine.add(Request("d", prompt(5), WARM))
    assert 1 <= refused.value.retry_after <= 60
    run(engine)
    engine.add(Request("d", prompt(5), WARM))
    run(engine)


def alone(request: Request, config: EngineConfig, **toy: Any) -> list[int]:
    engine = Engine(ToyRuntime(**toy), config)
    engine.add(request)
    return answer(run(engine), request.id)


@pytest.mark.parametrize("window", [None, 150])
@pytest.mark.parametrize("pages", [200, 14])
def test_an_answer_is_the_same_alone_and_not_where_pieces_have_bits_of_their_own(
    pages: int, window: int | None
) -> None:
    """Beside others, with other prompts' and earlier turns' pages found again, scored, put aside, asked twice."""
    sizes: dict[str, Any] = {"window": window, "max_tokens": 300, "max_pieces": 8, "by_row": 4}
    config = EngineConfig(cut=128)
    engine = Engine(ToyRuntime(pages, **sizes), config)
    rng = random.Random(3)
    requests = []
    for i in range(24):
        shared = prompt(300) if i % 3 == 0 else prompt(140, 1) if i % 3 == 1 else ()
        params = dataclasses.replace(WARM, seed=i, max_new_tokens=rng.choice((3, 40, 150)))
        asked = shared + prompt(rng.randrange(1, 200), i)
        scored = 0 if i % 7 == 3 else None
        requests.append(Request(f"r{i}", asked, params, client=f"c{i % 4}", score_prompt=scored))
    events: list[Event] = []
    for i, request in enumerate(requests):
        engine.add(request)
        if i % 5 == 4:
            events += engine.step()
    events += run(engine)
    said = {r.id: answer(events, r.id) for r in requests}
    again = [dataclasses.replace(r, id=f"{r.id} again", score_prompt=None) for r in requests[:6]]
    turns = [
        Request(f"{r.id} next", r.prompt + tuple(said[r.id]) + prompt(9), with_seed(i))
        for i, r in enumerate(requests[:9])
    ]
    for request in again + turns:
        engine.add(request)
    events += run(engine)
    for request in requests + again + turns:
        found = answer(events, request.id)
        assert found == alone(request, config, pages=200, **sizes), request.id
    assert nothing_held(engine)
    assert (engine.stats().preemptions > 0) == (pages == 14)
    assert engine.stats().cached_tokens > 0
