"""Clients for benchmarks of the server: plain sockets, what came when, understood once all is there."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context


@dataclass
class Told:
    """What a client saw."""

    text: str = ""
    first: float | None = None  # seconds to the first token
    gaps: list[float] = field(default_factory=list)
    done: bool = False
    status: int = 0


async def ask(port: int, body: bytes, cut: int | None = None) -> Told:
    """One request over a connection of its own; with `cut`, hang up after so many pieces."""
    told, began = Told(), time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    came: list[tuple[float, bytes]] = []
    count = 0
    try:
        told.status = int((await reader.readline()).split()[1])
        while some := await reader.read(1 << 16):
            came.append((time.perf_counter(), some))
            count += some.count(b"data: ")
            if cut is not None and count >= cut:
                break
    finally:
        writer.close()
    _understand(told, came, began, cut)
    return told


def _understand(told: Told, came: list[tuple[float, bytes]], began: float, cut: int | None) -> None:
    """Lines and times from what came, once all is there: a client should not be what is measured."""
    last, count, left = began, 0, b""
    for now, some in came:
        *lines, left = (left + some).split(b"\n")
        for line in lines:
            if line.startswith(b"data: [DONE]"):
                told.done = True
            elif line.startswith(b"data: ") and (cut is None or count < cut):
                text = json.loads(line[6:])["choices"][0]["text"]
                count += 1
                if not text:
                    continue
                told.text += text
                if told.first is None:
                    told.first = now - began
                else:
                    told.gaps.append(now - last)
                last = now


async def closed_loop(
    port: int, bodies: list[bytes], clients: int, cuts: dict[int, int]
) -> tuple[list[Told], float]:
    """Every client asks, waits for the answer, asks the next."""
    told: list[Told] = [Told()] * len(bodies)
    left = iter(range(len(bodies)))

    async def client() -> None:
        for i in left:
            told[i] = await asyncio.wait_for(ask(port, bodies[i], cuts.get(i)), 600)

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return told, time.perf_counter() - began


class Crowd:
    """Clients in several processes, so that one interpreter is not what is measured."""

    def __init__(self, port: int, clients: int, processes: int) -> None:
        self.port, self.clients, self.processes = port, clients, processes
        self._pool = ProcessPoolExecutor(processes, get_context("spawn")) if processes > 1 else None
        if self._pool is not None:
            list(self._pool.map(time.sleep, [0.5] * processes))  # all of them started

    def ask(self, bodies: list[bytes], cuts: dict[int, int]) -> tuple[list[Told], float]:
        """Everything is asked, `clients` at a time -> answers, seconds."""
        if self._pool is None:
            return asyncio.run(closed_loop(self.port, bodies, self.clients, cuts))
        step, began = self.processes, time.perf_counter()
        shares = [
            (
                self.port,
                bodies[i::step],
                self.clients // step,
                {n // step: c for n, c in cuts.items() if n % step == i},
            )
            for i in range(step)
        ]
        told = [Told()] * len(bodies)
        for i, part in enumerate(self._pool.map(_share, shares)):
            told[i::step] = part
        return told, time.perf_counter() - began


def _share(given: tuple[int, list[bytes], int, dict[int, int]]) -> list[Told]:
    return asyncio.run(closed_loop(*given))[0]


async def poisson(port: int, bodies: list[bytes], rate: float) -> list[Told]:
    """Requests come on their own, `rate` a second on average."""
    rng, tasks = random.Random(9), []
    for body in bodies:
        tasks.append(asyncio.create_task(ask(port, body)))
        await asyncio.sleep(rng.expovariate(rate))
    return list(await asyncio.gather(*tasks))


def percentile(values: Iterable[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def latencies(told: list[Told]) -> dict[str, float]:
    first = [t.first for t in told if t.first is not None]
    gaps = [g for t in told for g in t.gaps]
    return {
        "ttft_p50_ms": 1e3 * percentile(first, 0.5),
        "ttft_p99_ms": 1e3 * percentile(first, 0.99),
        "itl_p50_ms": 1e3 * percentile(gaps, 0.5),
        "itl_p99_ms": 1e3 * percentile(gaps, 0.99),
    }
