"""Text in, text out, from threads and event loops, and the engine's thread below it."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from quantmill.errors import BadRequest, Busy, QuantmillError
from quantmill.runtime.engine_types import EngineConfig, Reason, Request
from quantmill.runtime.llm import LLM, Job
from quantmill.runtime.llm_text import StopText
from quantmill.types import SamplingParams
from toy_llm import toy_llm, toy_tokenizer
from toy_runtime import ToyRuntime, told

WARM = SamplingParams(temperature=1.0, top_k=0, max_new_tokens=40, seed=5, ignore_eos=True)
ENDLESS = SamplingParams(temperature=1.0, top_k=0, max_new_tokens=3000, seed=5, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with toy_llm() as made:
        yield made


def toy_of(llm: LLM) -> ToyRuntime:
    assert isinstance(llm.runtime, ToyRuntime)
    return llm.runtime


def with_(params: SamplingParams = WARM, **changes: object) -> SamplingParams:
    return dataclasses.replace(params, **changes)


def test_generate_gives_answers_in_order(llm: LLM) -> None:
    prompts = ["hello", "the cat", "ünï \N{SNOWMAN}"]
    answers = llm.generate(prompts, [with_(seed=i) for i in range(3)])
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids = toy_tokenizer().encode(prompt)
        right = told(toy_of(llm), ids, with_(seed=i))
        assert answer.prompt_ids == tuple(ids)
        assert answer.choices[0].token_ids == right
        assert answer.text == toy_tokenizer().decode(right)
        assert answer.completion_tokens == 40


def test_one_prompt_may_be_ids_or_text(llm: LLM) -> None:
    (by_text,) = llm.generate("hello", WARM)
    (by_ids,) = llm.generate(toy_tokenizer().encode("hello"), WARM)
    assert by_text.text == by_ids.text
    assert llm.generate([], WARM) == []


def test_more_prompts_than_may_wait() -> None:
    with toy_llm(EngineConfig(max_waiting=3), max_pieces=2) as llm:
        answers = llm.generate([f"p{i}" for i in range(20)], with_(max_new_tokens=3))
        assert len(answers) == 20


def test_streams_join_to_the_answer(llm: LLM) -> None:
    (whole,) = llm.generate("hello", WARM)
    deltas = list(llm.stream(Job("hello", WARM)))
    assert "".join(d.text for d in deltas) == whole.text
    assert all("\ufffd" not in d.text for d in deltas[:1])
    assert deltas[-1].ending is not None
    assert deltas[-1].ending.reason is Reason.LENGTH


def test_multi_byte_characters_are_never_broken(llm: LLM) -> None:
    snowmen = toy_tokenizer().encode("\N{SNOWMAN}\N{PILE OF POO}é" * 3)
    only = dict.fromkeys(snowmen, 100.0)
    deltas = list(llm.stream(Job("x", with_(max_new_tokens=200, logit_bias=only))))
    text = "".join(d.text for d in deltas)
    assert text == toy_tokenizer().decode([s.token for d in deltas for s in d.tokens])


@pytest.mark.parametrize("place", [1, 7, 20])
@pytest.mark.parametrize("size", [1, 2, 9])
def test_stop_strings_across_token_borders(llm: LLM, place: int, size: int) -> None:
    (whole,) = llm.generate("hello", WARM)
    stop = whole.text[place : place + size]
    params = with_(stop=("never said", stop))
    (cut,) = llm.generate("hello", params)
    assert cut.text == whole.text[: whole.text.index(stop)]
    ending = cut.choices[0].ending
    assert ending.reason is Reason.STOP
    assert ending.stop == stop
    assert ending.completion_tokens == len(cut.choices[0].tokens) <= 40
    deltas = list(llm.stream(Job("hello", params)))
    assert "".join(d.text for d in deltas) == cut.text


def test_stop_text_holds_back_only_what_it_must() -> None:
    stop = StopText(("END", "abcabd"))
    assert [stop.push(t) for t in ("xE", "N", "Ex", "abc", "abc", "abd...")] == [
        "x",
        "",
        "ENEx",
        "",
        "abc",
        "",
    ]
    assert stop.found == "abcabd"
    assert stop.push("more") == stop.flush() == ""
    plain = StopText(())
    assert plain.push("all") == "all"
    held = StopText(("END",))
    assert held.push("the EN") == "the "
    assert held.flush() == "EN"


def test_best_of_gives_the_likeliest(llm: LLM) -> None:
    (four,) = llm.generate("hello", with_(n=4, best_of=4, logprobs=0))
    (two,) = llm.generate("hello", with_(n=2, best_of=4))
    likeliest = sorted(four.choices, key=lambda c: -c.ending.logprob)[:2]
    assert [c.text for c in two.choices] == [c.text for c in likeliest]
    assert [c.index for c in two.choices] == [0, 1]


def test_prompt_scores(llm: LLM) -> None:
    async def run() -> None:
        answer = await llm.agenerate(Job("hello cat", with_(max_new_tokens=1), score_prompt=2))
        assert [s.token for s in answer.prompt_scores] == list(answer.prompt_ids[1:])
        assert all(len(s.top) == 2 for s in answer.prompt_scores)

    asyncio.run(run())


def test_embeddings_have_length_one(llm: LLM) -> None:
    vectors = llm.embed(["hello", "the cat"])
    assert vectors.shape == (2, 16)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 1], abs=1e-5)
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-3


def test_many_at_once_in_an_event_loop(llm: LLM) -> None:
    async def run() -> list[str]:
        jobs = [llm.agenerate(Job(f"prompt {i % 7}", with_(seed=i))) for i in range(40)]
        return [a.text for a in await asyncio.gather(*jobs)]

    alone = [llm.generate(f"prompt {i % 7}", with_(seed=i))[0].text for i in range(40)]
    assert asyncio.run(run()) == alone


def test_leaving_a_stream_ends_the_work() -> None:
    with toy_llm() as llm:
        stream = llm.stream(Job("hello", ENDLESS))
        next(stream)
        stream.close()

        async def run() -> None:
            task = asyncio.create_task(llm.agenerate(Job("hello", ENDLESS)))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            async for _ in (deltas := llm.astream(Job("hello", ENDLESS))):
                break
            await deltas.aclose()

        asyncio.run(run())
        assert llm.engine.drain(120)
        stats = llm.engine.stats()
        assert stats.pages.held == 0
        assert stats.finished == {Reason.ABORT: 3}


def test_a_full_line_is_refused() -> None:
    with toy_llm(EngineConfig(max_waiting=1), max_pieces=1) as llm:
        first = llm.stream(Job("hello", ENDLESS))
        next(first)
        llm.engine.submit(Request("second", (2, 3), ENDLESS))
        with pytest.raises(Busy, match="1 requests are waiting already"):
            llm.engine.submit(Request("third", (2, 3), ENDLESS))
        llm.engine.finish("second")
        first.close()


def test_bad_requests_are_refused_before_they_reach_the_engine(llm: LLM) -> None:
    with pytest.raises(BadRequest, match="the prompt is empty"):
        llm.generate("")
    with pytest.raises(BadRequest, match="2 sets of parameters for 1 prompts"):
        llm.generate("a", [WARM, WARM])
    with pytest.raises(BadRequest, match="outside the vocabulary"):
        llm.generate([[99999]])


def test_a_broken_back_end_ends_every_answer(caplog: pytest.LogCaptureFixture) -> None:
    with toy_llm() as llm, caplog.at_level(logging.CRITICAL):
        stream = llm.stream(Job("hello", ENDLESS))
        next(stream)
        toy_of(llm).fail = True
        with pytest.raises(QuantmillError, match="the toy broke"):
            list(stream)
        with pytest.raises(QuantmillError, match="the engine has stopped: RuntimeError: the toy broke"):
            llm.generate("hello")
        assert not llm.engine.alive


def test_draining_ends_what_is_under_way_and_takes_nothing_new() -> None:
    with toy_llm() as llm:
        stream = llm.stream(Job("hello", with_(max_new_tokens=200)))
        next(stream)
        assert llm.engine.drain(120)
        with pytest.raises(Busy, match="shutting down"):
            llm.generate("hello")
        assert list(stream)[-1].ending is not None


def test_closing_ends_answers() -> None:
    llm = toy_llm()
    stream = llm.stream(Job("hello", ENDLESS))
    next(stream)
    llm.close()
    last = list(stream)[-1]
    assert last.ending is not None
    assert last.ending.reason is Reason.ABORT


def test_a_real_model_says_the_same_alone_in_a_batch_and_with_little_room(tiny_llama: Path) -> None:
    prompts = [f"the cat sat on a mat {i} " * (1 + 3 * (i % 5)) for i in range(10)]
    params = [with_(seed=i, max_new_tokens=30) for i in range(10)]
    with LLM(tiny_llama, device="cpu", threads=1) as llm:
        alone = [llm.generate(p, q)[0].text for p, q in zip(prompts, params, strict=True)]
        assert [a.text for a in llm.generate(prompts, params)] == alone
        assert llm.engine.stats().cached_tokens > 0
    with LLM(tiny_llama, device="cpu", threads=1, kv_tokens=6 * 64) as llm:
        assert [a.text for a in llm.generate(prompts, params)] == alone
        assert llm.engine.stats().pages.held == 0
