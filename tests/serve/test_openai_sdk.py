"""OpenAI's own client, unchanged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI

from quantmill.serve.settings import ServeSettings
from quantmill.types import SamplingParams
from serve.conftest import Running, Start
from toy_llm import toy_tokenizer
from toy_runtime import told

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "the weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def client(toy: Running) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{toy.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def expected(text: str, chat: bool = True, **changes: Any) -> str:
    """What the toy says, without any server."""
    from toy_llm import toy_llm

    tokenizer = toy_tokenizer()
    ids = tokenizer.chat_ids([{"role": "user", "content": text}]) if chat else tokenizer.encode(text)
    params = SamplingParams(
        **{"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0} | changes
    )
    with toy_llm() as llm:
        assert not isinstance(llm.runtime, int)
        return tokenizer.decode(told(llm.runtime, ids, params))  # type: ignore[arg-type]


def test_chat(client: OpenAI) -> None:
    made = client.chat.completions.create(model="toy", messages=HELLO, max_tokens=12, seed=3)
    assert made.choices[0].message.content == expected("hello", max_new_tokens=12, seed=3)
    assert made.choices[0].message.role == "assistant"
    assert made.choices[0].finish_reason == "length"
    assert made.usage is not None
    assert made.usage.completion_tokens == 12
    assert made.usage.total_tokens == made.usage.prompt_tokens + 12
    assert made.model == "toy"


def test_chat_streams(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model="toy",
        messages=HELLO,
        max_tokens=20,
        seed=3,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == expected("hello", max_new_tokens=20, seed=3)
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 20
    assert all(c.usage is None for c in chunks[:-1])


def test_several_answers(client: OpenAI) -> None:
    made = client.chat.completions.create(model="toy", messages=HELLO, max_tokens=8, seed=3, n=3)
    texts = [c.message.content for c in made.choices]
    assert len(set(texts)) == 3
    stream = client.chat.completions.create(
        model="toy", messages=HELLO, max_tokens=8, seed=3, n=3, stream=True
    )
    streamed = ["", "", ""]
    for chunk in stream:
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts
    assert made.usage is not None
    assert made.usage.completion_tokens == 24


def test_stop_strings_and_parameters(client: OpenAI) -> None:
    whole = expected("hello", max_new_tokens=30, seed=4, temperature=0.7, top_p=0.9)
    stop = whole[5:7]
    made = client.chat.completions.create(
        model="toy", messages=HELLO, max_completion_tokens=30, seed=4, temperature=0.7, top_p=0.9, stop=[stop]
    )
    assert made.choices[0].message.content == whole[: whole.index(stop)]
    assert made.choices[0].finish_reason == "stop"
    biased = client.chat.completions.create(
        model="toy", messages=HELLO, max_tokens=3, logit_bias={"40": 100}, temperature=0
    )
    assert biased.choices[0].message.content == toy_tokenizer().decode([40, 40, 40])
    more = client.chat.completions.create(
        model="toy",
        messages=HELLO,
        max_tokens=5,
        seed=1,
        extra_body={
            "top_k": 3,
            "min_p": 0.05,
            "repetition_penalty": 1.3,
            "typical_p": 0.9,
            "ignore_eos": True,
        },
        presence_penalty=0.5,
        frequency_penalty=0.5,
        user="me",
    )
    assert more.usage is not None
    assert more.usage.completion_tokens == 5


def test_log_probabilities(client: OpenAI) -> None:
    made = client.chat.completions.create(
        model="toy", messages=HELLO, max_tokens=6, seed=3, logprobs=True, top_logprobs=4
    )
    assert made.choices[0].logprobs is not None
    content = made.choices[0].logprobs.content
    assert content is not None
    assert len(content) == 6
    raw = b"".join(bytes(t.bytes or []) for t in content)
    assert raw.decode("utf-8", "replace") == made.choices[0].message.content
    for token in content:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 4
        assert token.top_logprobs[0].logprob >= max(token.logprob, token.top_logprobs[3].logprob) - 1e-6
    stream = client.chat.completions.create(
        model="toy", messages=HELLO, max_tokens=6, seed=3, logprobs=True, stream=True
    )
    seen = [t for c in stream for x in c.choices if x.logprobs for t in x.logprobs.content or []]
    assert [t.token for t in seen] == [t.token for t in content]


def test_json(client: OpenAI) -> None:
    short = {str(toy_tokenizer().encode(c)[0]): 12 for c in '"}'}  # else noise goes on within a string
    made = client.chat.completions.create(
        model="toy", messages=HELLO, seed=1, logit_bias=short, response_format={"type": "json_object"}
    )
    assert isinstance(json.loads(made.choices[0].message.content or ""), dict)
    schema = {
        "type": "object",
        "properties": {"age": {"type": "integer"}, "ok": {"type": "boolean"}},
        "required": ["age", "ok"],
        "additionalProperties": False,
    }
    made = client.chat.completions.create(
        model="toy",
        messages=HELLO,
        seed=1,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": schema, "strict": True},
        },
    )
    document = json.loads(made.choices[0].message.content or "")
    assert set(document) == {"age", "ok"}
    assert made.choices[0].finish_reason == "stop"


def test_a_parsed_model(client: OpenAI) -> None:
    from pydantic import BaseModel

    class Person(BaseModel):
        age: int
        ok: bool

    made = client.chat.completions.parse(model="toy", messages=HELLO, seed=2, response_format=Person)
    assert isinstance(made.choices[0].message.parsed, Person)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_tools_that_must_be_called(client: OpenAI, choice: Any) -> None:
    made = client.chat.completions.create(
        model="toy", messages=HELLO, tools=[WEATHER], tool_choice=choice, seed=5
    )
    (call,) = made.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    assert made.choices[0].finish_reason == "tool_calls"
    assert made.choices[0].message.content is None
    stream = client.chat.completions.create(
        model="toy", messages=HELLO, tools=[WEATHER], tool_choice=choice, seed=5, stream=True
    )
    name = arguments = ""
    finish = None
    for chunk in stream:
        for part in chunk.choices[0].delta.tool_calls or []:
            assert part.function is not None
            name += part.function.name or ""
            arguments += part.function.arguments or ""
        finish = chunk.choices[0].finish_reason or finish
    assert (name, arguments, finish) == ("weather", call.function.arguments, "tool_calls")


def test_tool_results_go_back(client: OpenAI) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    made = client.chat.completions.create(
        model="toy", messages=messages, tools=[WEATHER], max_tokens=5, seed=1
    )
    assert made.choices[0].finish_reason == "length"
    assert made.choices[0].message.content


def test_completions(client: OpenAI) -> None:
    made = client.completions.create(model="toy", prompt=["hello", "the cat"], max_tokens=9, seed=2, n=2)
    assert [c.index for c in made.choices] == [0, 1, 2, 3]
    assert made.choices[0].text == expected("hello", chat=False, max_new_tokens=9, seed=2)
    assert made.choices[2].text == expected("the cat", chat=False, max_new_tokens=9, seed=2)
    by_ids = client.completions.create(
        model="toy", prompt=toy_tokenizer().encode("hello"), max_tokens=9, seed=2
    )
    assert by_ids.choices[0].text == made.choices[0].text
    stream = client.completions.create(
        model="toy", prompt=["hello", "the cat"], max_tokens=9, seed=2, n=2, stream=True
    )
    texts = [""] * 4
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [c.text for c in made.choices]
    best = client.completions.create(model="toy", prompt="hello", max_tokens=5, seed=2, n=1, best_of=3)
    assert len(best.choices) == 1


def test_prompts_are_scored(client: OpenAI) -> None:
    """What lm-eval asks for."""
    made = client.completions.create(
        model="toy", prompt="the cat sat", max_tokens=1, echo=True, logprobs=2, temperature=0
    )
    scores = made.choices[0].logprobs
    assert scores is not None
    ids = toy_tokenizer().encode("the cat sat")
    assert made.choices[0].text.startswith("the cat sat")
    assert scores.tokens is not None
    assert scores.token_logprobs is not None
    assert "".join(scores.tokens) == made.choices[0].text
    assert len(scores.tokens) == len(ids) + 1
    assert scores.token_logprobs[0] is None
    assert all(p <= 0 for p in scores.token_logprobs[1:])
    only = client.completions.create(model="toy", prompt="the cat sat", max_tokens=0, echo=True, logprobs=0)
    assert only.choices[0].text == "the cat sat"
    assert only.choices[0].logprobs is not None
    assert only.choices[0].logprobs.token_logprobs == pytest.approx(
        scores.token_logprobs[:-1], abs=1e-6, nan_ok=True
    )


def test_embeddings(client: OpenAI) -> None:
    made = client.embeddings.create(model="toy", input=["hello", "the cat"])  # base64, by the client's choice
    plain = client.embeddings.create(model="toy", input=["hello", "the cat"], encoding_format="float")
    for a, b in zip(made.data, plain.data, strict=True):
        assert len(a.embedding) == 16
        assert a.embedding == pytest.approx(b.embedding, abs=1e-6)
    assert made.usage.prompt_tokens == sum(len(toy_tokenizer().encode(t)) for t in ("hello", "the cat"))


def test_models(client: OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["toy", "other", "owner/name:main"]
    assert client.models.retrieve("owner/name:main").owned_by == "quantmill"
    assert client.chat.completions.create(model="owner/name:main", messages=HELLO, max_tokens=2).choices


def test_errors(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4' here") as missing:
        client.chat.completions.create(model="gpt-4", messages=HELLO)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="temperature") as wrong:
        client.chat.completions.create(model="toy", messages=HELLO, temperature=-1)
    assert wrong.value.param == "temperature"
    assert wrong.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="the context has room for 4096"):
        client.completions.create(model="toy", prompt=[5] * 5000)
    with pytest.raises(openai.BadRequestError, match="vocabulary"):
        client.completions.create(model="toy", prompt=[5000])
    with pytest.raises(openai.BadRequestError, match="cannot be used"):
        client.chat.completions.create(model="toy", messages=HELLO, extra_body={"guided_regex": "("})
    with pytest.raises(openai.BadRequestError, match="best_of"):
        client.completions.create(model="toy", prompt="x", n=2, best_of=1)


def test_keys(start: Start) -> None:
    running = start(ServeSettings(api_keys=("user-secret-1",), admin_keys=("admin-secret-1",)))

    def names(key: str) -> list[str]:
        with OpenAI(base_url=f"{running.url}/v1", api_key=key, max_retries=0) as client:
            return [m.id for m in client.models.list()]

    with pytest.raises(openai.AuthenticationError, match="not known"):
        names("wrong")
    assert names("user-secret-1") == names("admin-secret-1") == ["toy", "other"]


def test_a_full_server_asks_to_come_back(start: Start) -> None:
    running = start(ServeSettings(max_concurrent=1))
    with OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(
            model="toy", messages=HELLO, max_tokens=3000, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        with pytest.raises(openai.RateLimitError, match="under way") as refused:
            client.chat.completions.create(model="toy", messages=HELLO)
        assert int(refused.value.response.headers["retry-after"]) >= 1
        stream.close()
