"""The engine over the toy runtime: every answer is the one that the toy tells without any engine."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from quantmill.errors import BadRequest, Busy, QuantmillError
from quantmill.runtime.engine import Engine
from quantmill.runtime.engine_types import (
    EmbeddingEvent,
    EngineConfig,
    Event,
    FinishEvent,
    PromptEvent,
    Reason,
    Request,
    TokenEvent,
)
from quantmill.runtime.interface import PAGE, Piece
from quantmill.types import SamplingParams
from toy_runtime import END, VOCAB, ToyRuntime, told

WARM = SamplingParams(
    temperature=1.0, top_p=0.95, top_k=0, repetition_penalty=1.1, max_new_tokens=30, seed=4, ignore_eos=True
)
EAGER = EngineConfig(pass_seconds=math.inf)


def prompt(size: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(random.Random(seed * 1000 + size).randrange(VOCAB - 1) for _ in range(size))


def run(engine: Engine, most: int = 5000) -> list[Event]:
    events: list[Event] = []
    for _ in range(most):
        if not engine.has_work:
            break
        events += engine.step()
    assert not engine.has_work
    return events


def answer(events: Sequence[Event], request: str, choice: int = 0) -> list[int]:
    return [
        e.sampled.token
        for e in events
        if isinstance(e, TokenEvent) and e.request == request and e.choice == choice
    ]


def finish(events: Sequence[Event], request: str, choice: int = 0) -> FinishEvent:
    (found,) = [
        e for e in events if isinstance(e, FinishEvent) and e.request == request and e.choice == choice
    ]
    return found


def nothing_held(engine: Engine) -> bool:
    return engine.pool.counts.held == 0 and not engine.scheduler.running and not engine.scheduler.waiting


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


def with_seed(seed: int) -> SamplingParams:
    return dataclasses.replace(WARM, seed=seed, max_new_tokens=12)


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


def test_n_answers_share_the_prompt_and_differ() -> None:
    toy = ToyRuntime()
    params = dataclasses.replace(WARM, n=3, best_of=4)
    engine = Engine(toy)
    engine.add(Request("a", prompt(200), params))
    events = run(engine)
    for choice in range(4):
        assert answer(events, "a", choice) == told(toy, prompt(200), params, choice)
        assert finish(events, "a", choice).logprob < 0
    assert sum(sum(p) for p in toy.passes) < 200 + 3 * 64 + 4 * 30 + 1
    assert finish(events, "a", 1).cached_tokens == 192


def test_a_prefix_is_found_again() -> None:
    toy = ToyRuntime()
    engine = Engine(toy)
    engine.add(Request("a", prompt(150), WARM))
    first = run(engine)
    before = sum(map(sum, toy.passes))
    again = prompt(150) + tuple(answer(first, "a")) + prompt(20, 7)
    engine.add(Request("b", again, WARM))
    events = run(engine)
    assert answer(events, "b") == told(toy, again, WARM)
    assert finish(events, "b").cached_tokens == 128
    assert sum(map(sum, toy.passes)) - before == len(again) - 128 + 29
    engine = Engine(ToyRuntime(), EngineConfig(prefix_cache=False))
    for name in "ab":
        engine.add(Request(name, prompt(150), WARM))
        assert finish(run(engine), name).cached_tokens == 0


def test_an_answer_is_stopped_at_once() -> None:
    toy = ToyRuntime()
    engine = Engine(toy)
    engine.add(Request("a", prompt(100), dataclasses.replace(WARM, n=2)))
    engine.add(Request("b", prompt(50), WARM))
    engine.add(Request("never begun", prompt(50), WARM))
    for _ in range(4):
        engine.step()
    assert [e.reason for e in engine.finish("a", 1, Reason.STOP)] == [Reason.STOP]
    assert len(engine.finish("a")) == 1
    assert engine.finish("a") == engine.finish("unknown") == []
    engine.finish("never begun")
    events = run(engine)
    assert {e.request for e in events} == {"b"}
    assert nothing_held(engine)


def test_the_context_ends_an_answer() -> None:
    toy = ToyRuntime(context=70)
    engine = Engine(toy)
    engine.add(Request("a", prompt(60), WARM))
    events = run(engine)
    assert len(answer(events, "a")) == 10
    assert finish(events, "a").reason is Reason.LENGTH
    with pytest.raises(BadRequest, match="70 tokens, the context has room for 70"):
        engine.add(Request("b", prompt(70), WARM))


def test_a_cache_smaller_than_the_context_ends_an_answer_too() -> None:
    toy = ToyRuntime(pages=2)
    engine = Engine(toy)
    engine.add(Request("a", prompt(100), dataclasses.replace(WARM, max_new_tokens=500)))
    events = run(engine)
    assert len(answer(events, "a")) == 28
    with pytest.raises(BadRequest, match="has room for 128"):
        engine.add(Request("b", prompt(128), WARM))


def test_a_window_lets_a_small_cache_hold_a_long_text() -> None:
    toy = ToyRuntime(pages=5, window=70, max_tokens=100)
    engine = Engine(toy)
    params = dataclasses.replace(WARM, max_new_tokens=200)
    engine.add(Request("a", prompt(700), params))
    assert answer(run(engine), "a") == told(toy, prompt(700), params)
    assert nothing_held(engine)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request("a", ()), "the prompt is empty"),
        (Request("a", (0, VOCAB)), "outside the vocabulary of 61"),
        (Request("a", (-1,)), "outside the vocabulary"),
        (Request("a", (1,), SamplingParams(logit_bias={61: 1.0})), "logit_bias names token 61"),
        (Request("a", (1,), SamplingParams(stop_token_ids=(77,))), "stop_token_ids names token 77"),
    ],
)
def test_requests_that_can_never_be_served_are_refused(request_: Request, message: str) -> None:
    engine = Engine(ToyRuntime())
    with pytest.raises(BadRequest, match=message):
        engine.add(request_)
    assert not engine.has_work


def test_two_requests_of_one_name_are_refused() -> None:
    engine = Engine(ToyRuntime())
    engine.add(Request("a", prompt(3)))
    with pytest.raises(BadRequest, match="a request a already"):
        engine.add(Request("a", prompt(3)))


@pytest.mark.parametrize("size", [1, 2, 64, 65, 150])
def test_prompts_are_scored(size: int) -> None:
    toy = ToyRuntime(max_tokens=100)
    engine = Engine(toy, EAGER)
    engine.add(Request("warm the cache", prompt(size), WARM))
    run(engine)
    params = dataclasses.replace(WARM, max_new_tokens=2)
    engine.add(Request("a", prompt(size), params, score_prompt=3))
    events = run(engine)
    scores = [s for e in events if isinstance(e, PromptEvent) for s in e.scores]
    assert [s.token for s in scores] == list(prompt(size))[1:]
    vectors = np.cumsum([toy.vector(t, p) for p, t in enumerate(prompt(size))], axis=0)
    logits = toy.logits(vectors).astype(np.float64)
    logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    right = [logp[i, t] for i, t in enumerate(prompt(size)[1:])]
    assert [s.logprob for s in scores] == pytest.approx(right, abs=1e-4)
    assert all(len(s.top) == 3 and s.top[0][1] >= s.top[2][1] for s in scores)
    assert answer(events, "a") == told(toy, prompt(size), params)


def test_embeddings_are_the_mean_of_the_hidden_states() -> None:
    toy = ToyRuntime(max_tokens=40)
    engine = Engine(toy)
    engine.add(Request("a", prompt(100), embed=True))
    engine.add(Request("b", prompt(30), WARM))
    events = run(engine)
    (vector,) = [e.vector for e in events if isinstance(e, EmbeddingEvent)]
    states = np.cumsum([toy.vector(t, p) for p, t in enumerate(prompt(100))], axis=0)
    assert vector == pytest.approx(states.mean(axis=0), rel=1e-4)
    assert answer(events, "b") == told(toy, prompt(30), WARM)
    assert finish(events, "a").completion_tokens == 0
    assert nothing_held(engine)


class Alternating:
    """A constraint: even and odd tokens in turn, four in all."""

    def __init__(self) -> None:
        self.said: list[int] = []

    def mask(self) -> np.ndarray:
        return np.arange(VOCAB) % 2 == len(self.said) % 2

    def accept(self, token: int) -> bool:
        self.said.append(token)
        return len(self.said) == 4


def test_a_constraint_rules_and_ends_the_answer() -> None:
    engine = Engine(ToyRuntime(ends=()))
    engine.add(Request("a", prompt(5), dataclasses.replace(WARM, n=2), matcher=Alternating))
    engine.add(Request("b", prompt(6), WARM))
    events = run(engine)
    for choice in (0, 1):
        said = answer(events, "a", choice)
        assert [t % 2 for t in said] == [0, 1, 0, 1]
        assert finish(events, "a", choice).reason is Reason.STOP
    assert len(answer(events, "b")) == 30


def test_a_model_without_numbers_ends_its_answers_with_an_error() -> None:
    toy = ToyRuntime()
    engine = Engine(toy)
    engine.add(Request("a", prompt(5), WARM))
    engine.step()
    toy.head[:] = np.nan
    events = run(engine)
    assert finish(events, "a").reason is Reason.ERROR
    assert "no finite logit" in finish(events, "a").message
    assert nothing_held(engine)
    assert engine.stats().finished == {Reason.ERROR: 1}
    assert issubclass(Busy, QuantmillError)


def test_everything_can_be_ended() -> None:
    engine = Engine(ToyRuntime(max_pieces=2))
    for i in range(5):
        engine.add(Request(f"{i}", prompt(70, i), WARM))
    engine.step()
    ended = engine.finish_all(Reason.ERROR, "it is over")
    assert [(e.reason, e.message) for e in ended if isinstance(e, FinishEvent)] == [
        (Reason.ERROR, "it is over")
    ] * 5
    assert nothing_held(engine)


def test_a_long_random_life() -> None:
    """Come, go, be put aside: no answer is wrong, no page is lost."""
    toy = ToyRuntime(14, max_tokens=48, max_pieces=6)
    engine = Engine(toy, EAGER)
    rng = random.Random(8)
    requests: dict[str, Request] = {}
    left: set[str] = set()
    events: list[Event] = []
    for i in range(400):
        if i < 300 and rng.random() < 0.3:
            params = dataclasses.replace(
                WARM, seed=i, max_new_tokens=rng.randrange(1, 90), n=rng.choice((1, 1, 2))
            )
            request = Request(
                f"{i}", prompt(rng.choice((3, 64, 130, 200)), rng.randrange(3)), params, f"{i % 3}"
            )
            requests[request.id] = request
            engine.add(request)
        if requests and rng.random() < 0.08:
            name = rng.choice(list(requests))
            left.add(name)
            events += engine.finish(name)
        events += engine.step()
    events += run(engine)
    assert nothing_held(engine)
    assert len(requests) > 60
    for name, request in requests.items():
        for choice in range(request.choices):
            right = told(toy, request.prompt, request.params, choice)
            said = answer(events, name, choice)
            assert said == (right if name not in left else right[: len(said)]), name
    assert engine.stats().preemptions > 0
