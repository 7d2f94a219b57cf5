"""The server under load beside its own engine: throughput, latencies, aborted clients, equal answers, memory.

    python benchmarks/serve_load.py MODEL [--clients 64] [--requests 500] [--minutes 0] [--json FILE]
    python benchmarks/serve_load.py --mistral [--requests 512]        Mistral-7B's shapes with random weights, a GPU

In one run, on one machine, the same requests (mixed lengths, a seed each):

    offline    the engine without a server, all requests at hand: the limit that the server is measured against
    alone      some of the requests, one at a time
    full       64 clients, each asking again as soon as it is answered; answers are compared with those above
    passes     what the engine did meanwhile, offline and served, and what the server's processes took of a core
    half       Poisson arrivals at half of that rate: time to first token, time between tokens
    chaos      64 clients, a fifth of the answers cut off by their clients; then: is anything stuck or lost?
    memory     --minutes of the same, and the server's resident memory before and after

--engine process thread does all but the first two with either kind of engine. Lines begin with the seconds so far.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from serve_clients import Crowd, closed_loop, latencies, poisson

ROOT = Path(__file__).resolve().parents[1]
FIGURES = (
    "passes",
    "answer_tokens",
    "prompt_tokens",
    "busy_seconds",
)  # of an engine, by the names in /metrics
BEGAN = time.perf_counter()


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
    from dataclasses import replace

    from quantmill.runtime.engine_types import EngineConfig
    from quantmill.runtime.llm import LLM
    from quantmill.types import SamplingParams

    todo = [Ask(**a) for a in spec["asks"]]
    params = [SamplingParams(0.8, 0.95, 40, 1.0, a.tokens, a.seed, ignore_eos=True) for a in todo]
    config = EngineConfig(max_running=spec["clients"], max_waiting=len(todo) + 1)
    with LLM(spec["folder"], device=spec["device"], threads=spec["threads"], engine=config) as llm:
        warm = [Ask(**a) for a in spec["warm"]]  # compiling, allocating
        llm.generate([a.prompt for a in warm], [replace(params[0], max_new_tokens=a.tokens) for a in warm])
        answers, rates, before = [], [], llm.engine.stats()
        for part in halves(len(todo)):
            began = time.perf_counter()
            answers += llm.generate([a.prompt for a in todo[part]], params[part])
            rates.append(sum(a.tokens for a in todo[part]) / (time.perf_counter() - began))
        after = llm.engine.stats()
        passes = {name: getattr(after, name) - getattr(before, name) for name in FIGURES}
        alone = [llm.generate([todo[i].prompt], [params[i]])[0].text for i in range(spec["alone"])]
        texts = [a.text for a in answers]
        found = {"runtime": llm.facts.name, "rates": rates, "passes": passes}
        return found | {"texts": texts, "alone": alone}


def halves(count: int) -> tuple[slice, slice]:
    """Every rate is taken twice, on requests of its own (nothing is cached), and the better one counts: who else
    uses the machine in the meantime takes from one of them."""
    return slice(0, count // 2), slice(count // 2, count)


def start_server(
    folder: Path, args: argparse.Namespace, engine: str | None
) -> tuple[subprocess.Popen[str], int]:
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
    command += [f"--engine-{engine}"] if engine else []
    log = open(args.log, "a")  # noqa: SIM115  # the server's, until it ends
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


def cores(pid: int) -> dict[str, float]:
    """Seconds of processor time so far: of the server, and of its engine's process where it has one."""
    import psutil

    process = psutil.Process(pid)
    found = {"server": sum(process.cpu_times()[:2])}
    spent = [sum(p.cpu_times()[:2]) for p in process.children(recursive=True)]
    return found | ({"engine": max(spent)} if spent else {})


def run(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    todo = asks(folder, args.requests, args.longest_prompt, args.longest_answer)
    warm = asks(folder, args.clients, args.longest_prompt, 16, seed=7)
    total = sum(a.tokens for a in todo)
    alone = min(args.alone, len(todo))
    spec = {"asks": [asdict(a) for a in todo], "folder": str(folder), "clients": args.clients, "alone": alone}
    spec["warm"] = [asdict(a) for a in warm]
    limit = _child(spec | {"device": args.device, "threads": args.threads})
    best = max(limit["rates"])
    say(f"offline   {best:8.1f} tok/s  {limit['runtime']}, {len(todo)} requests, {total} tokens")
    say(f"          {_passes(limit['passes'])}")
    differ = sum(a != b for a, b in zip(limit["alone"], limit["texts"], strict=False))
    report: dict[str, Any] = {"offline_tok_s": best, "offline_passes": limit["passes"]}
    report |= {"alone_differ": differ, "alone": alone}
    say(f"alone     {alone - differ} of {alone} answers equal those in the batch")
    Path(args.log).unlink(missing_ok=True)
    for engine in args.engine or [None]:
        report[engine or "server"] = served(folder, args, engine, todo, warm, best, limit["texts"])
    return report


def served(
    folder: Path,
    args: argparse.Namespace,
    engine: str | None,
    todo: list[Ask],
    warm: list[Ask],
    best: float,
    texts: list[str],
) -> dict[str, Any]:
    """All that is measured of one server, beside the engine's `best` rate and its answers."""
    server, port = start_server(folder, args, engine)
    say(f"serving   engine: {engine or 'default'}")
    bodies = [a.body("m") for a in todo]
    try:
        asyncio.run(closed_loop(port, [a.body("m") for a in warm], args.clients, {}))
        crowd = Crowd(port, args.clients, args.processes)
        report = full(crowd, todo, bodies, server.pid, best, texts)
        if args.half:
            fresh = asks(folder, args.half, args.longest_prompt, args.longest_answer, seed=6)
            pace = 0.5 * report["server_tok_s"] / (sum(a.tokens for a in fresh) / len(fresh))
            told = asyncio.run(poisson(port, [a.body("m") for a in fresh], pace))
            report["half"] = latencies(told)
            say(f"half      {len(fresh)} requests, {pace:.1f} a second: {_said(report['half'])}")
        if args.abort:
            report["chaos"] = chaos(crowd, bodies, args, texts)
        if args.minutes:
            report["memory"] = memory(server.pid, crowd, bodies, args)
    finally:
        server.terminate()
        code = server.wait(60)
    say(f"SIGTERM   exit code {code}")
    return report | {"exit_code": code}


def full(
    crowd: Crowd, todo: list[Ask], bodies: list[bytes], pid: int, best: float, texts: list[str]
) -> dict[str, Any]:
    """All clients at once, in two halves; the better rate counts, as it does offline."""
    told, rates, took = [], [], 0.0
    before, spent = counters(crowd.port), cores(pid)
    for part in halves(len(todo)):
        some, seconds = crowd.ask(bodies[part], {})
        told += some
        took += seconds
        rates.append(sum(a.tokens for a in todo[part]) / seconds)
    passes = {name: value - before[name] for name, value in counters(crowd.port).items()}
    shares = {name: (value - spent.get(name, 0.0)) / took for name, value in cores(pid).items()}
    rate, equal = max(rates), sum(t.text == text for t, text in zip(told, texts, strict=True))
    say(f"full      {rate:8.1f} tok/s  {1 - rate / best:+.1%} overhead, {equal} of {len(told)} answers equal")
    say(f"          {_said(latencies(told))}")
    say(f"          {_passes(passes)}; cores: {', '.join(f'{n} {s:.2f}' for n, s in shares.items())}")
    report = {"server_tok_s": rate, "overhead": 1 - rate / best, "equal": equal, "full": latencies(told)}
    return report | {"rates": rates, "passes": passes, "cores": shares}


def counters(port: int) -> dict[str, float]:
    time.sleep(0.05)  # the last pass's figures come just after its tokens
    return {name: metric(port, f"quantmill_{name}_total") for name in FIGURES}


def _passes(found: dict[str, float]) -> str:
    passes = max(1.0, found["passes"])
    return (
        f"{passes:.0f} passes of {1e3 * found['busy_seconds'] / passes:.2f} ms, "
        f"{found['answer_tokens'] / passes:.1f} answers and "
        f"{found['prompt_tokens'] / passes:.1f} prompt tokens each"
    )


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
    print(f"{time.perf_counter() - BEGAN:6.1f}  {line}", flush=True)


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
    parser.add_argument("--abort", type=float, default=0.2, help="share of cut answers; 0: no chaos")
    parser.add_argument("--alone", type=int, default=50)
    parser.add_argument("--half", type=int, default=200, help="requests of the Poisson round; 0: none")
    parser.add_argument("--minutes", type=float, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--engine",
        choices=("thread", "process"),
        nargs="+",
        help="where the server's engine runs; both: in turn",
    )
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
