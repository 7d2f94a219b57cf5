"""64 clients at once, some of which hang up: every answer is the one given alone, and nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import random
import time

from serve.conftest import Start
from serve.raw import post_json

CLIENTS, REQUESTS, ABORTED = 64, 160, 0.2


def body(i: int, stream: bool) -> dict[str, object]:
    rng = random.Random(i)
    prompt = [rng.randrange(2, 300) for _ in range(rng.choice((3, 20, 70, 130)))]
    said = {
        "model": "toy",
        "prompt": prompt,
        "max_tokens": rng.choice((2, 10, 90)),
        "seed": i,
        "stream": stream,
    }
    return said | {"ignore_eos": True, "top_p": 0.9}


async def ask(port: int, i: int, hang_up: bool) -> str | None:
    """The streamed answer; None where the client hung up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = json.dumps(body(i, True)).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data)
    text, left = "", random.Random(i).randrange(4) if hang_up else 1 << 30
    try:
        while line := await reader.readline():
            if line.startswith(b"data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
            left -= 1
            if left < 0:
                return None
        return text
    finally:
        writer.close()


async def all_at_once(port: int, hang_up: set[int]) -> dict[int, str | None]:
    found: dict[int, str | None] = {}
    todo = iter(range(REQUESTS))

    async def client() -> None:
        for i in todo:
            found[i] = await asyncio.wait_for(ask(port, i, i in hang_up), 120)

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return found


def test_many_clients_some_of_which_leave(start: Start) -> None:
    # Fewer pages than 16 answers would like.
    running = start(models=("toy",), pages=28, max_tokens=128, max_pieces=16)
    rng = random.Random(2)
    hang_up = {i for i in range(REQUESTS) if rng.random() < ABORTED}
    found = asyncio.run(all_at_once(running.port, hang_up))
    engine = running.llms["toy"].engine
    until = time.monotonic() + 120
    while (engine.stats().running or engine.stats().waiting) and time.monotonic() < until:
        time.sleep(0.02)
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.pages.held) == (0, 0, 0)
    assert not running.server.server_state.connections
    for i in range(REQUESTS):
        if i not in hang_up:
            status, alone = post_json(running.port, "/v1/completions", body(i, False))
            assert status == 200
            assert found[i] == alone["choices"][0]["text"], i
    assert stats.preemptions > 0
    assert stats.finished["abort"] > 0


def test_leaving_ends_an_answer_that_is_not_streamed(start: Start) -> None:
    running = start(models=("toy",))

    async def leave() -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", running.port)
        data = json.dumps({**body(1, False), "max_tokens": 3500}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        while not running.llms or not running.llms["toy"].engine.stats().running:
            await asyncio.sleep(0.01)
        writer.close()

    asyncio.run(leave())
    engine, began = running.llms["toy"].engine, time.monotonic()
    while not engine.stats().finished and time.monotonic() - began < 120:
        time.sleep(0.01)
    assert engine.stats().finished == {"abort": 1}
    assert engine.stats().answer_tokens < 3500
