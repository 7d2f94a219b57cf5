"""Requests that cannot be served, in families: each gets a 4xx in OpenAI's shape, and the server goes on."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

from serve.conftest import Running
from serve.raw import exchange, post

CHAT, TEXT, EMBED = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
MESSAGES = [{"role": "user", "content": "hello"}]
GOOD: dict[str, dict[str, Any]] = {
    CHAT: {"model": "toy", "messages": MESSAGES, "max_tokens": 2},
    TEXT: {"model": "toy", "prompt": "hello", "max_tokens": 2},
    EMBED: {"model": "toy", "input": "hello"},
    "/tokenize": {"model": "toy", "prompt": "hello"},
    "/detokenize": {"model": "toy", "tokens": [5]},
}
Case = tuple[str, bytes]


def changed(path: str, **fields: Any) -> Case:
    return path, json.dumps({**GOOD[path], **fields}).encode()


def wrong_types() -> Iterator[Case]:
    fields = {
        "temperature": ["hot", "0.7", [], {}, True],
        "max_tokens": ["2", 2.5, [], True],
        "n": ["1", 0, -1, 1.5],
        "seed": ["1", 1.5, {}],
        "stop": [5, {}, [5], [None]],
        "stream": ["yes", 1],
        "logit_bias": [[], "x", {"a": 1}, {"-1": 1}, {"5": "much"}],
        "top_p": ["1", []],
        "user": [5, []],
        "stream_options": [True, {"include_usage": "yes"}],
    }
    for path, (field, values) in itertools.product((CHAT, TEXT), fields.items()):
        for value in values:
            yield changed(path, **{field: value})
    for value in (
        "hello",
        {},
        [],
        [5],
        [{"role": "user"}, 5],
        [{"content": "x"}],
        [{"role": "king", "content": "x"}],
    ):
        yield changed(CHAT, messages=value)
    for value in ([{"type": "text"}], [{"type": "image_url", "image_url": {"url": "x"}}], 5, {"text": "x"}):
        yield changed(CHAT, messages=[{"role": "user", "content": value}])
    for value in (5, {}, [], [[]], [1.5], [["a"]], [[1], "a"], [True], None):
        yield changed(TEXT, prompt=value)
        yield changed(EMBED, input=value)
    for value in (5, None, "", [], {}, True, "x" * 600):
        for path in GOOD:
            yield changed(path, model=value)
    yield changed("/detokenize", tokens=["5"])
    yield changed("/tokenize", messages=MESSAGES)


def out_of_range() -> Iterator[Case]:
    fields = {
        "temperature": [-0.1, 101, 1e300, 10**400],
        "top_p": [-0.1, 0, 1.1],
        "n": [10**6, 10**30],
        "max_tokens": [-1, 10**30],
        "seed": [1 << 64, -(1 << 64), 10**100],
        "presence_penalty": [-2.1, 3],
        "frequency_penalty": [-3, 2.5],
        "top_k": [-2, 1 << 40],
        "min_p": [-1, 2],
        "repetition_penalty": [0, -1, 1e9],
        "stop": [["x"] * 20],
        "logit_bias": [{"5": 101}, {"99999999": 1}, {"400": 1}],
        "stop_token_ids": [[-1], [400], [1 << 40]],
    }
    for path, (field, values) in itertools.product((CHAT, TEXT), fields.items()):
        for value in values:
            yield changed(path, **{field: value})
    yield changed(CHAT, logprobs=True, top_logprobs=21)
    yield changed(CHAT, top_logprobs=5)
    yield changed(TEXT, logprobs=99)
    yield changed(TEXT, best_of=99)
    yield changed(TEXT, prompt=[[5]] * 300)
    yield changed(TEXT, prompt=[318])
    yield changed(TEXT, prompt=[-1])
    yield changed(TEXT, prompt=[10**40])
    yield changed(TEXT, prompt=[5] * 4096)
    yield changed(TEXT, prompt="")
    yield changed(EMBED, input="")
    yield changed(EMBED, dimensions=99999)
    yield changed("/detokenize", tokens=[99999])


def unknown() -> Iterator[Case]:
    for path in GOOD:
        yield changed(path, surprise=1)
        yield changed(path, **{"": 1})
        yield changed(path, __class__={})
    yield changed(CHAT, messages=[{**MESSAGES[0], "colour": "red"}])
    yield changed(CHAT, response_format={"type": "xml"})
    yield changed(CHAT, response_format={"type": "json_schema"})
    yield changed(CHAT, response_format={"type": "json_schema", "json_schema": {"name": "x"}})
    schema = {"name": "x", "schema": {"type": "no such type"}}
    yield changed(CHAT, response_format={"type": "json_schema", "json_schema": schema})
    yield changed(CHAT, response_format={"type": "json_object"}, guided_regex="a")
    yield changed(CHAT, guided_regex="(")
    yield changed(CHAT, guided_grammar="start: x")
    yield changed(CHAT, guided_choice=[])
    yield changed(CHAT, tools=[{"type": "function"}])
    yield changed(CHAT, tools=[{"type": "function", "function": {"name": "a b"}}])
    yield changed(CHAT, tool_choice="required")
    tool = {"type": "function", "function": {"name": "f"}}
    yield changed(CHAT, tools=[tool], tool_choice={"type": "function", "function": {"name": "g"}})
    yield changed(CHAT, chat_template="{{ messages }}")
    yield changed(CHAT, continue_final_message=True)
    yield changed(TEXT, suffix="end")
    yield changed(TEXT, echo=True, logprobs=1, stream=True)


def path_tricks() -> Iterator[Case]:
    names = (
        "../../etc/passwd",
        "/etc/passwd",
        "toy/../toy",
        "toy\x00",
        "owner/name:../main",
        "owner/name:a/b",
        "~",
    )
    names += (
        "owner/name:.git",
        "file:///etc",
        "toy ",
        "TOY",
        "owner/name:main\n",
        "C:\\x",
        "%2e%2e",
        "owner/other:main",
    )
    for name in names:
        yield changed(CHAT, model=name)
        yield changed(TEXT, model=name)


def not_json() -> Iterator[Case]:
    good = json.dumps(GOOD[CHAT]).encode()
    yield from (
        (CHAT, body) for body in (b"", b"{", b"[]", b"5", b"null", b'"x"', b"\x00", good[:-1], good + b"}")
    )
    yield CHAT, good.replace(b"hello", b"\xff\xfe")
    yield CHAT, good.replace(b"hello", b"\xed\xa0\x80")
    yield CHAT, good.replace(b"hello", b"\\ud800")
    yield CHAT, good.replace(b"hello", b"\\u12")
    yield CHAT, good.decode().encode("utf-16")
    yield CHAT, b"[" * 100_000
    yield CHAT, b'{"a":' * 5_000 + b"1" + b"}" * 5_000
    yield CHAT, good.replace(b'"max_tokens": 2', b'"metadata": ' + b'{"a":' * 80 + b"1" + b"}" * 80)
    for number in (b"NaN", b"Infinity", b"-Infinity", b"1e999", b"9" * 5000, b"0x10", b"1_000", b"."):
        yield CHAT, good.replace(b'"max_tokens": 2', b'"temperature": ' + number)


FAMILIES = (wrong_types, out_of_range, unknown, path_tricks, not_json)


def test_every_malformed_request_is_refused_and_the_server_goes_on(toy: Running) -> None:
    cases = [(family.__name__, case) for family in FAMILIES for case in family()]
    assert len(cases) >= 200
    for family, (path, body) in cases:
        status, answer = post(toy.port, path, body)
        told = f"{family}: {path} {body[:200]!r} -> {status} {answer[:300]!r}"
        assert 400 <= status < 500, told
        error = json.loads(answer)["error"]
        assert error["message"], told
        assert len(error["message"]) < 800, told
        assert set(error) == {"message", "type", "param", "code"}, told
    assert sorted(toy.opened) in (["toy"], ["owner/name:main", "toy"], [])
    for path, fields in GOOD.items():
        assert post(toy.port, path, json.dumps(fields).encode())[0] == 200, path


def test_strange_http(toy: Running) -> None:
    good = json.dumps(GOOD[CHAT]).encode()
    assert post(toy.port, CHAT, good, {"Content-Type": "text/plain"})[0] == 415
    assert post(toy.port, CHAT, good, {"Content-Type": ""})[0] == 415
    assert post(toy.port, CHAT, b"{" + b" " * (5 << 20) + good[1:])[0] == 413
    assert post(toy.port, CHAT, b"", {"Content-Length": "99999999999"})[0] in (400, 413)
    chunked = b"".join(b"%x\r\n%b\r\n" % (1 << 16, b" " * (1 << 16)) for _ in range(80)) + b"0\r\n\r\n"
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += "Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    assert exchange(toy.port, head.encode() + chunked)[0] == 413
    for path in (
        "/",
        "/v1",
        "/v1/chat",
        "/v2/models",
        "/..%2f..%2fetc/passwd",
        "/v1/models/../../x",
        "/admin/models",
    ):
        assert post(toy.port, path, good)[0] in (404, 405), path
    get = b"GET %b HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    assert exchange(toy.port, get % CHAT.encode())[0] == 405
    assert exchange(toy.port, get % b"/v1/models/nothing")[0] == 404
    assert exchange(toy.port, b"complete nonsense\r\n\r\n")[0] == 400
    assert exchange(toy.port, get % b"/health")[0] == 200


def test_other_sites_cannot_use_a_local_server(toy: Running) -> None:
    good = json.dumps(GOOD[CHAT]).encode()
    assert post(toy.port, CHAT, good, {"Host": "evil.example"})[0] == 403
    assert post(toy.port, CHAT, good, {"Origin": "http://evil.example"})[0] == 403
    assert post(toy.port, CHAT, good, {"Host": "localhost:99", "Origin": "http://localhost:99"})[0] == 200
    assert post(toy.port, CHAT, good, {"Host": "[::1]:99"})[0] == 200
