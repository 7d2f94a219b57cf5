"""The engine in a process of its own, over the toy model: a thread's answers, and every end in order."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from functools import partial

import pytest

from quantmill.errors import BadRequest, Busy, QuantmillError, UnsupportedModel
from quantmill.runtime.constraints import Constraint, ConstraintKind
from quantmill.runtime.engine_child import Opening
from quantmill.runtime.engine_process import EngineProcess
from quantmill.runtime.engine_types import EngineConfig, Reason, Request
from quantmill.runtime.llm import LLM, Job
from quantmill.types import SamplingParams
from toy_llm import toy_llm, toy_tokenizer
from toy_opening import open_badly, open_nothing, open_toy

WARM = SamplingParams(max_new_tokens=12, seed=4)
ENDLESS = SamplingParams(max_new_tokens=4000, seed=4, ignore_eos=True)


@pytest.fixture(scope="module")
def opening(tmp_path_factory: pytest.TempPathFactory) -> Opening:
    words = tmp_path_factory.mktemp("toy") / "tokenizer.json"
    toy_tokenizer().backend.save(str(words))
    return partial(open_toy, words, toy_tokenizer().special)


@pytest.fixture(scope="module")
def apart(opening: Opening) -> Iterator[LLM]:
    with LLM.over_process(opening, toy_tokenizer(), EngineConfig(max_waiting=4)) as llm:
        yield llm


def test_the_answers_are_those_of_a_thread(apart: LLM) -> None:
    prompts = ["hello", "good day", "and so"]
    many = SamplingParams(max_new_tokens=9, seed=2, n=2, best_of=3, logprobs=2)
    shape = Constraint(ConstraintKind.REGEX, "[ab]{3}c")
    with toy_llm() as here:
        assert [a.text for a in apart.generate(prompts, WARM)] == [
            a.text for a in here.generate(prompts, WARM)
        ]
        assert apart.generate("x", many)[0].choices == here.generate("x", many)[0].choices
        assert apart.generate("x", ENDLESS, constraint=shape) == here.generate("x", ENDLESS, constraint=shape)
        assert (apart.embed(["a", "b"]) == here.embed(["a", "b"])).all()
    scored = list(apart.stream(Job("hello", SamplingParams(max_new_tokens=1), score_prompt=1)))
    assert scored[-1].ending is not None


def test_what_can_never_be_served_is_refused_here(apart: LLM) -> None:
    with pytest.raises(BadRequest, match="empty"):
        apart.generate([[]])
    with pytest.raises(BadRequest, match="regex"):
        apart.generate("x", constraint=Constraint(ConstraintKind.REGEX, "("))


def test_the_line_is_bounded_and_who_leaves_is_gone(apart: LLM) -> None:
    engine = apart.engine
    heard: list[str] = []

    def crowd() -> None:
        for i in range(60):  # sixteen answers at once, four may wait
            engine.submit(Request(f"r{i}", (2, 3), ENDLESS))
            heard.append(f"r{i}")

    with pytest.raises(Busy, match="waiting already"):
        crowd()
    assert len(heard) >= 4
    for name in heard:
        engine.finish(name)
    until = time.monotonic() + 120
    while engine.stats().running + engine.ahead and time.monotonic() < until:
        time.sleep(0.01)
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.pages.held) == (0, 0, 0)
    assert stats.finished[Reason.ABORT] >= len(heard)


def test_an_event_loop_is_served_too(apart: LLM) -> None:
    async def ask() -> list[str]:
        answers = await asyncio.gather(*(apart.agenerate(Job(p, WARM)) for p in ("a", "b", "c")))
        return [a.text for a in answers]

    assert asyncio.run(ask()) == [a.text for a in apart.generate(["a", "b", "c"], WARM)]


def test_functions_run_beside_the_model(apart: LLM) -> None:
    assert apart.beside(os.getpid) != os.getpid()
    with pytest.raises(ValueError, match="invalid literal"):
        apart.beside(int, "x")
    with toy_llm() as here:
        assert here.beside(os.getpid) == os.getpid()


def test_a_model_that_cannot_be_opened_is_told_as_it_is() -> None:
    with pytest.raises(UnsupportedModel, match="no such model"):
        EngineProcess(open_nothing, lambda events: None)
    with pytest.raises(QuantmillError, match="ended with code 7"):
        EngineProcess(open_badly, lambda events: None)


def test_when_the_process_dies_nobody_waits(opening: Opening) -> None:
    with LLM.over_process(opening, toy_tokenizer()) as llm:
        process = llm.beside(os.getpid)
        answer = llm.stream(Job("x", ENDLESS))
        next(answer)
        os.kill(process, signal.SIGKILL)
        with pytest.raises(QuantmillError, match="ended with code -9"):
            for _ in answer:
                pass
        assert not llm.engine.alive
        with pytest.raises(QuantmillError, match="has stopped"):
            llm.generate("x")
        assert llm.engine.drain(1)


def test_closing_ends_what_is_under_way(opening: Opening) -> None:
    with LLM.over_process(partial(opening, pages=2, context=64, max_tokens=32), toy_tokenizer()) as llm:
        assert llm.generate("x", ENDLESS)[0].choices[0].ending.reason is Reason.LENGTH
        answer = llm.stream(Job("x", ENDLESS))
        next(answer)
        llm.engine.close()
        left = list(answer)
        assert left[-1].ending is not None
        assert left[-1].ending.reason in (Reason.ABORT, Reason.LENGTH)
        with pytest.raises(Busy, match="shutting down"):
            llm.generate("x")
    assert not llm.engine.alive


def test_passes_that_overlap_say_the_same() -> None:
    prompts = ["hello", "good day", "and so", "x"]
    params = [SamplingParams(max_new_tokens=n, seed=n) for n in (1, 5, 30, 70)]
    with toy_llm() as plain, toy_llm() as late:
        engine = late.engine.engine  # type: ignore[union-attr]
        engine.overlaps = True
        assert late.generate(prompts, params) == plain.generate(prompts, params)
        assert late.engine.drain(120)
        assert engine.stats().pages.held == 0
