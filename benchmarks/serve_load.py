"""The server under load beside its own engine: throughput, latencies, aborted clients, equal answers, memory.

    python benchmarks/serve_load.py MODEL [--clients 64] [--requests 500] [--minutes 0] [--json FILE]
    python benchmarks/serve_load.py --mistral [--requests 512]        Mistral-7B's shapes with random weights, a GPU

In one run, on one machine, the same requests (mixed lengths, a seed each):

    offline    the engine without a server, all requests at hand: the limit that the server is measured against
    alone      some of the requests, one at a time
    full       64 clients, each asking again as soon as it is answered; answers are compared with those above
    half       Poisson arrivals at half of that rate: time to first token, time between tokens
    chaos      64 clients, a fifth of the answers cut off by their clients; then: is anything stuck or lost?
    memory     --minutes of the same, and the server's resident memory before and after
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Ask:
    """A request: a slice of text as token ids, and how much to say about it."""

    prompt: list[int]
    tokens: int
    seed: int

    def body(self, model: str) -> bytes:
        said = {"model": model, "prompt": self.prompt, "max_tokens": self.tokens, "seed": self.seed}
        more = {"temperature": 0.8, "top_p": 0.95, "top_k": 40, "ignore_eos": True, "stream": True}
        return json.dumps(said | more).encode()


@dataclass
class Told:
    """What a client saw."""

    text: str = ""
    first: float | None = None  # seconds to the first token
    gaps: list[float] = field(default_factory=list)
    done: bool = False
    status: int = 0


def asks(folder: Path, count: int, longest_prompt: int, longest_answer: int, seed: int = 5) -> list[Ask]:
    """Log-uniform lengths: many short ones, some long ones."""
    from quantmill.runtime.tokenizer import open_tokenizer

    text = "\n".join(p.read_text(encoding="utf-8") for p in sorted((ROOT / "docs").glob("*.md")))
    ids = open_tokenizer(folder).encode(text, special=False)
    rng = random.Random(seed)

    def length(low: int, high: int) -> int:
        return round(low * (high / low) ** rng.random())

    made = []
    for i in range(count):
        size, start = length(8, longest_prompt), rng.randrange(len(ids))
        prompt = (ids[start:] + ids * (1 + size // len(ids)))[:size]
        made.append(Ask(prompt, length(8, longest_answer), i))
    return made


def offline(spec: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own: all requests through the engine, then some of them alone."""
    from quantmill.runtime.engine_types import EngineConfig
    from quantmill.runtime.llm import LLM
    from quantmill.types import SamplingParams

    todo = [Ask(**a) for a in spec["asks"]]
    params = [SamplingParams(0.8, 0.95, 40, 1.0, a.tokens, a.seed, ignore_eos=True) for a in todo]
    config = EngineConfig(max_running=spec["clients"], max_waiting=len(todo) + 1)
    with LLM(spec["folder"], device=spec["device"], threads=spec["threads"], engine=config) as llm:
        llm.generate([a.prompt for a in todo[:8]], params[:8])  # compiling, allocating
        answers, rates = [], []
        for part in halves(len(todo)):
            began = time.perf_counter()
            answers += llm.generate([a.prompt for a in todo[part]], params[part])
            rates.append(sum(a.tokens for a in todo[part]) / (time.perf_counter() - began))
        alone = [llm.generate([todo[i].prompt], [params[i]])[0].text for i in range(spec["alone"])]
        texts = [a.text for a in answers]
        return {"runtime": llm.facts.name, "rates": rates, "texts": texts, "alone": alone}


def halves(count: int) -> tuple[slice, slice]:
    """Every rate is taken twice, on requests of its own (nothing is cached), and the better one counts: who else
    uses the machine in the meantime takes from one of them."""
    return slice(0, count // 2), slice(count // 2, count)


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


def start_server(folder: Path, args: argparse.Namespace) -> tuple[subprocess.Popen[str], int]:
    command = [
        sys.executable,
        "-m",
        "quantmill.cli",
        "serve",
        f"m={folder}",
        "--port",
        "0",
        "--max-waiting",
        "4096",
    ]
    command += ["--max-concurrent", "4096", "--device", args.device]
    command += ["--threads", str(args.threads)] if args.threads else []
    command += [f"--engine-{args.engine}"] if args.engine else []
    log = open(args.log, "w")  # noqa: SIM115  # the server's, until it ends
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    assert server.stdout is not None
    for line in server.stdout:
        if line.startswith("serving"):
            return server, int(line.rsplit(":", 1)[1])
    raise SystemExit(f"the server did not start: see {args.log}")


def resident(pid: int) -> int:
    import psutil

    process = psutil.Process(pid)
    return int(sum(p.memory_info().rss for p in (process, *process.children(recursive=True))))


def metric(port: int, name: str) -> float:
    from urllib.request import urlopen

    with urlopen(f"http://127.0.0.1:{port}/metrics") as page:
        lines = page.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name + "{"))


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


def run(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    todo = asks(folder, args.requests, args.longest_prompt, args.longest_answer)
    total = sum(a.tokens for a in todo)
    alone = min(args.alone, len(todo))
    spec = {"asks": [asdict(a) for a in todo], "folder": str(folder), "clients": args.clients, "alone": alone}
    limit = _child(spec | {"device": args.device, "threads": args.threads})
    best = max(limit["rates"])
    say(f"offline   {best:8.1f} tok/s  {limit['runtime']}, {len(todo)} requests, {total} tokens")
    differ = sum(a != b for a, b in zip(limit["alone"], limit["texts"], strict=False))
    report: dict[str, Any] = {"offline_tok_s": best, "alone_differ": differ, "alone": alone}
    say(f"alone     {alone - differ} of {alone} answers equal those in the batch")
    server, port = start_server(folder, args)
    bodies = [a.body("m") for a in todo]
    try:
        asyncio.run(closed_loop(port, bodies[:8], 8, {}))
        crowd = Crowd(port, args.clients, args.processes)
        told, rates = [], []
        for part in halves(len(todo)):
            some, seconds = crowd.ask(bodies[part], {})
            told += some
            rates.append(sum(a.tokens for a in todo[part]) / seconds)
        rate = max(rates)
        equal = sum(t.text == text for t, text in zip(told, limit["texts"], strict=True))
        overhead = 1 - rate / best
        report |= {"server_tok_s": rate, "overhead": overhead, "equal": equal, "full": latencies(told)}
        say(f"full      {rate:8.1f} tok/s  {overhead:+.1%} overhead, {equal} of {len(told)} answers equal")
        say(f"          {_said(report['full'])}")
        if args.half:
            fresh = asks(folder, args.half, args.longest_prompt, args.longest_answer, seed=6)
            pace = 0.5 * rate / (sum(a.tokens for a in fresh) / len(fresh))
            told = asyncio.run(poisson(port, [a.body("m") for a in fresh], pace))
            report["half"] = latencies(told)
            say(f"half      {len(fresh)} requests, {pace:.1f} a second: {_said(report['half'])}")
        report["chaos"] = chaos(crowd, bodies, args, limit["texts"])
        if args.minutes:
            report["memory"] = memory(server.pid, crowd, bodies, args)
    finally:
        server.terminate()
        code = server.wait(60)
    say(f"SIGTERM   exit code {code}")
    return report | {"exit_code": code}


def chaos(crowd: Crowd, bodies: list[bytes], args: argparse.Namespace, texts: list[str]) -> dict[str, Any]:
    rng = random.Random(3)
    cuts = {i: rng.randrange(0, 20) for i in range(len(bodies)) if rng.random() < args.abort}
    told, seconds = crowd.ask(bodies, cuts)
    whole = [i for i in range(len(bodies)) if i not in cuts]
    equal = sum(told[i].text == texts[i] for i in whole)
    beginnings = sum(texts[i].startswith(told[i].text) for i in cuts)
    time.sleep(1)
    stuck = metric(crowd.port, "quantmill_running_answers") + metric(crowd.port, "quantmill_waiting_requests")
    held = metric(crowd.port, "quantmill_kv_pages_held")
    say(
        f"chaos     {len(cuts)} of {len(bodies)} cut off ({beginnings} right so far), "
        f"{equal} of {len(whole)} others equal, {stuck:.0f} stuck, {held:.0f} pages lost, {seconds:.1f} s"
    )
    found = {"cut": len(cuts), "right_beginnings": beginnings, "whole": len(whole), "equal": equal}
    return found | {"stuck": stuck, "pages_lost": held}


def memory(pid: int, crowd: Crowd, bodies: list[bytes], args: argparse.Namespace) -> dict[str, Any]:
    """Resident memory over minutes of chaos; the first round is warm-up."""
    rng, began, sizes = random.Random(4), time.monotonic(), []
    while not sizes or time.monotonic() - began < 60 * args.minutes:
        cuts = {i: rng.randrange(0, 20) for i in range(len(bodies)) if rng.random() < args.abort}
        crowd.ask(bodies, cuts)
        sizes.append(resident(pid))
    growth = sizes[-1] / sizes[0] - 1
    say(
        f"memory    {sizes[0] / 1e6:.0f} MB -> {sizes[-1] / 1e6:.0f} MB in {len(sizes)} rounds: {growth:+.2%}"
    )
    return {"bytes": sizes, "growth": growth, "minutes": (time.monotonic() - began) / 60}


def _said(figures: dict[str, float]) -> str:
    return ", ".join(f"{k.removesuffix('_ms').replace('_', ' ')} {v:.1f} ms" for k, v in figures.items())


def _child(spec: dict[str, Any]) -> dict[str, Any]:
    """`offline` in another process: its threads and memory must not be there when the server is measured."""
    with tempfile.TemporaryDirectory() as folder:
        ask_file, told_file = Path(folder) / "ask.json", Path(folder) / "told.json"
        ask_file.write_text(json.dumps(spec))
        subprocess.run([sys.executable, __file__, "--offline", str(ask_file), str(told_file)], check=True)
        told: dict[str, Any] = json.loads(told_file.read_text())
        return told


def mistral(folder: Path) -> None:
    """Mistral-7B's shapes with random 4-bit weights, and a tokenizer whose every id is a word."""
    from gpu_decode import VOCAB, write_checkpoint
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from quantmill.types import QuantConfig

    write_checkpoint(folder, QuantConfig(), 32)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(f"Ġw{i}" for i in range(VOCAB - len(alphabet)))]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")


def say(line: str) -> None:
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="a model folder")
    parser.add_argument("--mistral", action="store_true")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--longest-prompt", type=int, default=512)
    parser.add_argument("--longest-answer", type=int, default=128)
    parser.add_argument("--abort", type=float, default=0.2)
    parser.add_argument("--alone", type=int, default=50)
    parser.add_argument("--half", type=int, default=200, help="requests of the Poisson round; 0: none")
    parser.add_argument("--minutes", type=float, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--engine", choices=("thread", "process"), help="where the server's engine runs")
    parser.add_argument(
        "--processes", type=int, default=max(1, (os.cpu_count() or 1) // 4), help="of the clients"
    )
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--log", default="serve_load.log", help="the server's log")
    if sys.argv[1:2] == ["--offline"]:
        Path(sys.argv[3]).write_text(json.dumps(offline(json.loads(Path(sys.argv[2]).read_text()))))
        return
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        if args.mistral:
            mistral(Path(made))
        elif args.model is None:
            parser.error("name a model folder, or --mistral")
        report = run(Path(made) if args.mistral else Path(args.model), args)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
