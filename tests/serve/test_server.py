"""The command `quantmill serve`, curl, metrics, keys and the end of a server."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from quantmill.commands import serving
from quantmill.console import Console
from quantmill.errors import BadRequest, QuantmillError
from quantmill.runtime.gpu.batches import BATCHES
from quantmill.serve.bandwidth import measure, measured
from quantmill.serve.logs import JsonLines
from quantmill.serve.server import open_model
from quantmill.serve.settings import ServeSettings
from serve.conftest import Start
from serve.raw import exchange, post_json

ASK = {"model": "toy", "prompt": "hello", "max_tokens": 4, "seed": 1, "ignore_eos": True}


def get(port: int, path: str, key: str | None = None) -> tuple[int, bytes]:
    bearer = f"Authorization: Bearer {key}\r\n" if key else ""
    head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{bearer}\r\n"
    return exchange(port, head.encode())


@pytest.mark.parametrize(("asked", "word"), [(True, "fast"), (False, "")])
def test_fast_batches_are_asked_for_by_name(asked: bool, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the environment, because engines and ranks are processes of their own."""
    monkeypatch.setenv(BATCHES, "")
    monkeypatch.setattr(serving, "serve", lambda *_, **__: None)
    monkeypatch.setattr(serving, "log_to_stderr", lambda: None)
    serving.serve_models((), ServeSettings(fast_batches=asked), Console(True), ui=False)
    assert os.environ[BATCHES] == word


def test_curl(start: Start) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not installed")
    running = start()
    chat = {"model": "toy", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "stream": True}
    command = [
        curl,
        "-sS",
        "-N",
        f"{running.url}/v1/chat/completions",
        "-H",
        "Content-Type: application/json",
    ]
    done = subprocess.run([*command, "-d", json.dumps(chat)], capture_output=True, text=True, check=True)
    events = [line for line in done.stdout.splitlines() if line]
    assert all(e.startswith("data: ") for e in events)
    assert events[-1] == "data: [DONE]"
    wrong = subprocess.run([*command, "-d", "{"], capture_output=True, text=True, check=True)
    assert "not JSON" in json.loads(wrong.stdout)["error"]["message"]


def test_only_admins_are_told_why_a_model_cannot_be_loaded(start: Start) -> None:
    settings = ServeSettings(api_keys=("user-key",), admin_keys=("admin-key",))
    port = start(settings, ("toy", "bad=broken")).port
    for path, ask in (("/v1/completions", ASK), ("/tokenize", {"prompt": "x"})):
        ask = {**ask, "model": "bad"}
        status, told = post_json(port, path, ask, {"Authorization": "Bearer user-key"})
        assert (status, told["error"]["code"]) == (503, "model_unavailable")
        assert "somebody" not in told["error"]["message"]
        status, told = post_json(port, path, ask, {"Authorization": "Bearer admin-key"})
        assert status == 400
        assert "has no weights" in told["error"]["message"]


def test_what_is_mounted_beside_the_api_is_for_this_address_only(start: Start) -> None:
    port = start().port
    for name, status in (("localhost", 404), ("127.0.0.1", 404), ("elsewhere.example", 403)):
        head = f"GET /ui/ HTTP/1.1\r\nHost: {name}:{port}\r\nConnection: close\r\n\r\n"
        assert exchange(port, head.encode())[0] == status


def test_tokens_there_and_back(start: Start) -> None:
    port = start().port
    status, made = post_json(
        port, "/tokenize", {"model": "toy", "prompt": "the cat ☃", "return_token_strs": True}
    )
    assert status == 200
    assert made["count"] == len(made["tokens"]) == len(made["token_strs"])
    assert made["max_model_len"] == 4096
    assert post_json(port, "/detokenize", {"model": "toy", "tokens": made["tokens"]})[1] == {
        "prompt": "the cat ☃"
    }
    talk = {"model": "toy", "messages": [{"role": "user", "content": "hi"}]}
    ids = post_json(port, "/tokenize", talk)[1]["tokens"]
    assert post_json(port, "/detokenize", {"model": "toy", "tokens": ids})[1]["prompt"].startswith(
        "[user] hi"
    )


def test_an_answer_is_continued(start: Start) -> None:
    port = start().port
    talk = [{"role": "user", "content": "hi"}]
    chat = {"model": "toy", "messages": talk, "seed": 4, "max_tokens": 20, "temperature": 0}
    whole = post_json(port, "/v1/chat/completions", chat)[1]["choices"][0]["message"]["content"]
    begun = [*talk, {"role": "assistant", "content": "It is"}]
    made = post_json(
        port, "/v1/chat/completions", {**chat, "messages": begun, "continue_final_message": True}
    )[1]
    ids = post_json(port, "/tokenize", {"model": "toy", "messages": talk})[1]["tokens"]
    prompt = post_json(port, "/detokenize", {"model": "toy", "tokens": ids})[1]["prompt"] + "It is"
    same = {"model": "toy", "prompt": prompt, "temperature": 0, "max_tokens": 20}
    raw = post_json(port, "/v1/completions", same)[1]["choices"][0]["text"]
    assert made["choices"][0]["message"]["content"] == raw != whole


def test_metrics_and_health(start: Start) -> None:
    measure("cpu int16", 1)
    port = start().port
    assert json.loads(get(port, "/health")[1]) == {"status": "ok", "models": {"toy": "idle", "other": "idle"}}
    post_json(port, "/v1/completions", ASK)
    post_json(port, "/v1/completions", {**ASK, "model": "nothing"})
    status, page = get(port, "/metrics")
    assert status == 200
    figures = dict(re.findall(r"^(quantmill_\S+) (\S+)$", page.decode(), re.M))
    assert figures['quantmill_answer_tokens_total{model="toy"}'] == "4.0"
    assert figures['quantmill_requests_total{path="/v1/completions",status="200"}'] == "1.0"
    assert figures['quantmill_requests_total{path="/v1/completions",status="404"}'] == "1.0"
    assert figures['quantmill_time_to_first_token_seconds_count{model="toy"}'] == "1.0"
    assert figures['quantmill_kv_pages{model="toy"}'] == "64.0"
    assert figures['quantmill_kv_pages_held{model="toy"}'] == "0.0"
    assert float(figures['quantmill_memory_bandwidth_share{model="toy"}']) > 0
    assert not any("nothing" in name for name in figures)


def test_the_bandwidth_is_measured_once() -> None:
    measure("cpu int16", 1)
    rate = measured("cpu int16")
    assert rate is not None
    assert rate > 1e8
    measure("cpu exact", 1)
    assert measured("cpu exact") == rate


def test_a_field_that_is_missing_or_misspelt_is_named(start: Start) -> None:
    server = start(ServeSettings(), ("toy",))
    status, told = post_json(server.port, "/v1/completions", {**ASK, "temprature": 0.5})
    assert status == 400
    assert told["error"]["message"] == "temprature is no field here: do you mean temperature?"
    status, told = post_json(server.port, "/v1/completions", {"prompt": "x"})
    assert (status, told["error"]["message"]) == (400, "model is missing: it has to be given")


def test_keys_open_doors(start: Start) -> None:
    running = start(ServeSettings(api_keys=("user-secret",), admin_keys=("admin-secret",)))
    port = running.port
    load = {"model": "more=other/one:x"}

    def ask(path: str, data: object, key: str | None) -> int:
        return post_json(port, path, data, {"Authorization": f"Bearer {key}"} if key else {})[0]

    assert get(port, "/health")[0] == 200
    assert get(port, "/metrics")[0] == get(port, "/v1/models")[0] == 401
    assert get(port, "/metrics", "user-secret")[0] == 200
    assert [ask("/v1/completions", ASK, k) for k in (None, "wrong", "user-secret", "admin-secret")] == [
        401,
        401,
        200,
        200,
    ]
    assert [ask("/admin/models/load", load, k) for k in (None, "user-secret", "admin-secret")] == [
        401,
        403,
        200,
    ]
    assert running.opened == ["toy", "other/one:x"]
    assert ask("/admin/models/unload", {"model": "more"}, "user-secret") == 403
    status, made = post_json(
        port, "/admin/models/unload", {"model": "more"}, {"Authorization": "Bearer admin-secret"}
    )
    assert (status, made["quantmill"]["state"]) == (200, "idle")
    seen = json.loads(get(port, "/v1/models", "user-secret")[1])["data"][0]["quantmill"]
    assert "source" not in seen


def test_limits(start: Start) -> None:
    port = start(ServeSettings(max_body_bytes=200, max_prompt_tokens=20)).port
    status, answer = post_json(port, "/v1/completions", {**ASK, "prompt": "x" * 300})
    assert (status, answer["error"]["code"]) == (413, "request_too_large")
    status, answer = post_json(port, "/v1/completions", {**ASK, "prompt": "qz" * 20})
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    assert post_json(port, "/v1/completions", ASK)[0] == 200


def test_requests_are_logged_as_json(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    port = start().port
    with caplog.at_level(logging.INFO, "quantmill.serve"):
        post_json(port, "/v1/completions", ASK)
        post_json(port, "/v1/completions", {**ASK, "top_p": 0})
    lines = [json.loads(JsonLines().format(r)) for r in caplog.records if r.getMessage() == "request"]
    assert [line["status"] for line in lines] == [200, 400]
    assert lines[0]["completion_tokens"] == 4
    assert lines[0]["model"] == "toy"
    assert "top_p" in lines[1]["error"]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_a_network_address_needs_a_key(host: str) -> None:
    with pytest.raises(BadRequest, match="--api-key"):
        ServeSettings(host=host)
    assert ServeSettings(host=host, no_auth=True)
    assert ServeSettings(host=host, api_keys=("long enough",))
    with pytest.raises(BadRequest, match="fewer than 8"):
        ServeSettings(host=host, api_keys=("short",))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_none(host: str) -> None:
    assert ServeSettings(host=host).loopback


@contextmanager
def command(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "quantmill.cli", "serve", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        with process:
            yield process
            process.kill()
    finally:
        process.kill()


def test_the_command_serves_and_ends_gracefully(tiny_llama: Path) -> None:
    with command(f"tiny={tiny_llama}", "--port", "0", "--device", "cpu", "--threads", "1") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        first = process.stdout.readline()
        assert first.startswith("serving tiny at http://127.0.0.1:"), process.stderr.read()
        port = int(first.rsplit(":", 1)[1])
        ask = {"model": "tiny", "prompt": "the cat", "max_tokens": 5, "seed": 1, "ignore_eos": True}
        status, made = post_json(port, "/v1/completions", ask)
        assert (status, made["usage"]["completion_tokens"]) == (200, 5)
        # A stream that is under way when the signal comes is sent to its end.
        long = {**ask, "max_tokens": 200, "stream": True}
        with socket.create_connection(("127.0.0.1", port), 120) as s:
            data = json.dumps(long).encode()
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            s.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
            got = s.recv(1000)
            process.send_signal(signal.SIGTERM)
            while part := s.recv(1 << 16):
                got += part
        assert b"data: [DONE]" in got
        assert process.wait(120) == 0
        lines = [json.loads(line) for line in process.stderr.read().splitlines() if line.startswith("{")]
        assert {"model loaded", "request", "model dropped"} <= {line["event"] for line in lines}


def test_an_engine_that_cannot_run_beside_the_server_runs_inside(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def __init__(self, *_: object) -> None:
            raise QuantmillError("no process today")

    monkeypatch.setattr("quantmill.runtime.llm.EngineProcess", Broken)
    with caplog.at_level(logging.WARNING, "quantmill.serve"):
        _, llm = open_model(str(tiny_llama), ServeSettings(device="cpu", threads=1, engine_process=True))
    with llm:
        assert llm.runtime is not None
        assert llm.generate("the cat")[0].text
    assert [(r.message, r.__dict__["error"]) for r in caplog.records if r.levelno == logging.WARNING] == [
        ("the engine runs inside the server", "no process today")
    ]


@pytest.mark.slow
def test_a_model_in_a_process_of_its_own_comes_back_after_it_died(tiny_llama: Path) -> None:
    words = (f"tiny={tiny_llama}", "--port", "0", "--device", "cpu", "--threads", "1", "--engine-process")
    ask = {"model": "tiny", "prompt": "the cat", "max_tokens": 5, "seed": 1, "ignore_eos": True}
    with command(*words) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline().rsplit(":", 1)[1])
        _, before = post_json(port, "/v1/completions", ask)
        for child in psutil.Process(process.pid).children(recursive=True):
            if "resource_tracker" not in " ".join(child.cmdline()):
                child.kill()
        until = time.monotonic() + 120
        while get(port, "/health")[1].find(b"degraded") < 0 and time.monotonic() < until:
            time.sleep(0.05)
        status, after = post_json(port, "/v1/completions", ask)
        assert (status, after["choices"]) == (200, before["choices"])
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0", "nowhere"], "give --api-key KEY, or --no-auth"),
        (["no/such/folder/at/all"], "does not exist"),
        (["--api-key", "abc", "x/y"], "fewer than 8 characters"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str) -> None:
    with command(*arguments, "--port", "0") as process:
        _, err = process.communicate(timeout=240)
    assert process.returncode == 2, err
    assert message in err
    assert "Traceback" not in err
