"""Names, loading on demand, and the memory budget."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from quantmill.errors import BadRequest, Busy, QuantmillError, SourceNotFound
from quantmill.runtime.llm import LLM, Job
from quantmill.serve.models import ModelService
from quantmill.serve.refusal import Refusal
from quantmill.types import SamplingParams
from toy_llm import toy_llm

SIZE = 64 * 100  # the toy's cache, in bytes; it has no weights


def service(budget: int = 1 << 40) -> tuple[ModelService, list[str]]:
    opened: list[str] = []

    def open_model(source: str) -> tuple[Path, LLM]:
        if source == "broken":
            raise SourceNotFound("broken is not there: name another")
        opened.append(source)
        return Path(source), toy_llm()

    return ModelService(open_model, budget), opened


def run(made: ModelService, work: Callable[[], Awaitable[None]]) -> None:
    async def live() -> None:
        made.loop = asyncio.get_running_loop()
        try:
            await work()
        finally:
            await made.close()

    asyncio.run(live())


def model_folder(path: Path, size: int = 0) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text('{"quantization_config": {"bits": 4}}')
    (path / "model.safetensors").write_bytes(b"x" * size)
    return path


def test_names(tmp_path: Path) -> None:
    made, _ = service()
    model_folder(tmp_path / "single")
    model_folder(tmp_path / "repo" / "gptq-8bit")
    model_folder(tmp_path / "repo" / "main")
    (tmp_path / "small.gguf").write_bytes(b"x")
    assert made.register(str(tmp_path / "single")) == ["single"]
    assert made.register(str(tmp_path / "repo")) == ["repo", "repo:gptq-8bit", "repo:main"]
    assert made.info("repo").source == str(tmp_path / "repo" / "main")
    assert made.register(str(tmp_path / "small.gguf")) == ["small"]
    assert made.register(f"mine={tmp_path / 'single'}") == ["mine"]
    assert made.register("owner/name:branch") == ["owner/name:branch"]
    assert made.register("owner/name:branch") == ["owner/name:branch"]
    model_folder(tmp_path / "else" / "single")
    with pytest.raises(BadRequest, match="two models are called single: name one of them, as in other="):
        made.register(str(tmp_path / "else" / "single"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceNotFound, match="holds no model"):
        made.register(str(tmp_path / "empty"))


def test_loaded_when_asked_for_and_only_once() -> None:
    made, opened = service()
    made.register("a")

    async def work() -> None:
        async def ask() -> None:
            async with made.using("a") as llm:
                assert llm.facts.name == "toy"

        await asyncio.gather(*(ask() for _ in range(5)))
        assert opened == ["a"]
        assert made.info("a").state == "ready"
        await made.unload("a")
        assert made.info("a").state == "idle"
        assert made.info("a").bytes == 0
        await ask()
        assert opened == ["a", "a"]

    run(made, work)


def test_the_longest_unused_makes_room() -> None:
    made, opened = service(budget=2 * SIZE + SIZE // 2)
    for name in "abc":
        made.register(name)

    async def work() -> None:
        await made.load("a")
        await made.load("b")
        await made.load("a")
        await made.load("c")
        assert opened == ["a", "b", "c"]
        assert [i.state for i in made.infos()] == ["ready", "ready", "ready"]  # found out after loading
        await made.load("b")

    run(made, work)


def test_weights_are_counted_before_they_are_loaded(tmp_path: Path) -> None:
    made, opened = service(budget=25_000)
    a, b = (str(model_folder(tmp_path / name, 10_000)) for name in "ab")
    made.register(a)
    made.register(b)
    made.register(str(model_folder(tmp_path / "huge", 30_000)))

    async def work() -> None:
        await made.load("a")
        assert made.info("a").bytes == 10_000 + SIZE
        assert made.info("a").parameters == {"bits": 4}
        await made.load("b")
        assert [i.state for i in made.infos()] == ["idle", "ready", "idle"]
        async with made.using("b"):
            with pytest.raises(Busy, match="hold the memory"):
                await made.load("a")
            with pytest.raises(Busy, match="is answering 1 requests"):
                await made.unload("b")
        await made.load("a")
        with pytest.raises(BadRequest, match="choose fewer bits, or raise --memory"):
            await made.load("huge")

    run(made, work)
    assert opened == [a, b, a]


def test_branches_of_a_served_repository_are_served() -> None:
    made, opened = service()
    made.register("owner/name")

    async def work() -> None:
        await made.load("owner/name:gptq-8bit-32g-actorder_True")
        assert opened == ["owner/name:gptq-8bit-32g-actorder_True"]
        assert len(made.infos()) == 2
        for name in (
            "owner/name:../x",
            "owner/name:.git",
            "owner/other:main",
            "other",
            "owner/name:" + "x" * 200,
        ):
            with pytest.raises(Refusal, match="there is no model"):
                await made.load(name)

    run(made, work)


def test_a_model_that_cannot_be_loaded_says_so() -> None:
    made, _ = service()
    made.register("broken")

    async def work() -> None:
        with pytest.raises(SourceNotFound):
            await made.load("broken")
        assert made.info("broken").state == "failed"
        assert made.info("broken").error == "broken is not there: name another"
        assert made.info("broken").users == 0

    run(made, work)


def test_an_engine_that_stopped_is_replaced(caplog: pytest.LogCaptureFixture) -> None:
    made, opened = service()
    made.register("a")

    async def work() -> None:
        async with made.using("a") as llm:
            llm.runtime.fail = True  # type: ignore[attr-defined]
            with caplog.at_level(logging.CRITICAL), pytest.raises(QuantmillError, match="the toy broke"):
                await llm.agenerate(Job("hello", SamplingParams(max_new_tokens=2)))
        async with made.using("a") as llm:
            assert (await llm.agenerate(Job("hello", SamplingParams(max_new_tokens=2)))).text
        assert opened == ["a", "a"]

    run(made, work)


def test_after_closing_nothing_is_loaded() -> None:
    made, _ = service()
    made.register("a")

    async def work() -> None:
        await made.close()
        with pytest.raises(Busy, match="shutting down"):
            await made.load("a")

    run(made, work)


def test_a_source_that_cannot_be_loaded_is_forgotten_again() -> None:
    made, _ = service()

    async def work() -> None:
        with pytest.raises(SourceNotFound):
            await made.take("new=broken")
        assert made.infos() == []
        assert (await made.take("fine=here")).state == "ready"
        assert (await made.take("fine")).name == "fine"

    run(made, work)


def test_a_model_that_is_held_is_not_dropped() -> None:
    made, _ = service(SIZE)
    made.register("a=one")
    made.register("b=two")

    async def work() -> None:
        with pytest.raises(BadRequest, match="load it first"):
            await made.hold("a")
        await made.load("a")
        llm = await made.hold("a")
        with pytest.raises(Busy):
            await made.unload("a")
        made.let_go("a")
        assert llm.engine.alive
        await made.unload("a")
        assert not llm.engine.alive

    run(made, work)
