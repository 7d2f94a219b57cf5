"""What the engine gives beside plain answers, how answers end, and what it refuses."""

from __future__ import annotations

import dataclasses
import random

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
)
from quantmill.types import SamplingParams
from runtime.engine_runs import EAGER, WARM, answer, finish, nothing_held, prompt, run
from toy_runtime import VOCAB, ToyRuntime, told


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
