"""`quantmill bench`: how fast a model reads and writes here, beside what this machine's memory could do."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from quantmill.console import Console, gigabytes
from quantmill.errors import BadRequest
from quantmill.runtime.interface import PAGE, Piece, Runtime

ROUNDS = 3  # of which the median counts
FIRST = 11  # seed of the tokens: random ids read as fast as any


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured besides loading."""

    prompt: int = 512  # tokens of the prompt that is read
    tokens: int = 64  # tokens that are written after it
    contexts: tuple[int, ...] = ()  # tokens in the cache while others are written
    batches: tuple[int, ...] = ()  # sequences that write together


def bench(
    runtime: Runtime, plan: Plan, load_s: float, read_rate: float | None, console: Console
) -> dict[str, Any]:
    """Measure, say it in lines, and return it for JSON: speeds in tokens a second.

    read_rate: bytes a second that this machine reads; None where nobody could tell. Raises BadRequest for a
    plan that the runtime's cache or context cannot hold.
    """
    facts = runtime.facts
    _check(runtime, plan)
    report: dict[str, Any] = {"runtime": facts.name, "load_s": round(load_s, 3)}
    console.say(f"{facts.name}: opened in {load_s:.2f} s")
    report["prefill_tok_s"] = prefill_rate(runtime, plan.prompt)
    console.say(f"reading a prompt of {plan.prompt} tokens: {report['prefill_tok_s']:.1f} tok/s")
    rate = decode_rate(runtime, 1, plan.prompt, plan.tokens)
    report["decode_tok_s"] = rate
    share = bandwidth_share(runtime, rate, plan.prompt + plan.tokens / 2, read_rate)
    report["bandwidth_share"] = share
    beside = "" if share is None else f", {share:.2f} of what reading {gigabytes(read_rate or 0)}/s allows"
    console.say(f"writing {plan.tokens} tokens after it: {rate:.1f} tok/s{beside}")
    if plan.contexts:
        report["contexts"] = {c: decode_rate(runtime, 1, c, plan.tokens) for c in plan.contexts}
        console.table(("context", "tok/s"), [(str(c), f"{r:.1f}") for c, r in report["contexts"].items()])
    if plan.batches:
        report["batches"] = {b: decode_rate(runtime, b, plan.prompt, plan.tokens) for b in plan.batches}
        console.table(
            ("sequences", "tok/s together"), [(str(b), f"{r:.1f}") for b, r in report["batches"].items()]
        )
    return report


def prefill_rate(runtime: Runtime, count: int) -> float:
    """Tokens a second of reading a prompt."""
    tokens = random_ids(runtime, count)
    pages = _pages(runtime, 0, 1, count)

    def once() -> float:
        begin = time.perf_counter()
        _read(runtime, tokens, pages)
        return time.perf_counter() - begin

    once()
    return round(count / median(once() for _ in range(ROUNDS)), 2)


def decode_rate(runtime: Runtime, batch: int, context: int, count: int) -> float:
    """Tokens a second that `batch` sequences write together, each `count` after `context` tokens, greedily."""
    pages = [_pages(runtime, i, batch, context + count + 1) for i in range(batch)]
    starts = random_ids(runtime, batch)
    if context > 1:
        for place in pages:
            _read(runtime, random_ids(runtime, context), place)

    def once() -> float:
        tokens = starts
        begin = time.perf_counter()
        for at in range(context, context + count):
            pieces = [Piece([t], at, p) for t, p in zip(tokens, pages, strict=True)]
            tokens = _greedy(runtime.forward(pieces))
        return time.perf_counter() - begin

    once()
    return round(batch * count / median(once() for _ in range(ROUNDS)), 2)


def bandwidth_share(runtime: Runtime, rate: float, context: float, read_rate: float | None) -> float | None:
    """Bytes that one sequence's steps read, over what the machine could have read in that time."""
    if not read_rate:
        return None
    facts = runtime.facts
    seen = min(context, facts.window or context)
    return round(rate * (facts.bytes_per_token + seen * facts.bytes_per_page / PAGE) / read_rate, 3)


def read_rate_of(runtime: Runtime, threads: int | None = None) -> float | None:
    """Bytes a second of a plain read on the device that the runtime is on."""
    if runtime.facts.name.startswith("cuda"):
        from quantmill.runtime.gpu.reading import read_rate

        return read_rate()
    from quantmill.kernels.cpu.bandwidth import streaming_read
    from quantmill.kernels.cpu.pool import default_threads, shared_pool

    return streaming_read(shared_pool(threads or default_threads()))


def open_timed(folder: Path, **options: Any) -> tuple[Runtime, float]:
    """A runtime and the seconds until it could be used."""
    from quantmill.runtime.opening import open_runtime

    begin = time.perf_counter()
    runtime = open_runtime(folder, **options)
    runtime.forward([Piece([0], 0, (0,))])
    return runtime, time.perf_counter() - begin


def random_ids(runtime: Runtime, count: int) -> list[int]:
    """The same every time."""
    generator = np.random.default_rng(FIRST)
    return [int(i) for i in generator.integers(0, runtime.facts.vocab_size, count)]


def _read(runtime: Runtime, tokens: Sequence[int], pages: Sequence[int]) -> None:
    """A prompt, in passes as long as the runtime takes them; waits for the result."""
    step = runtime.facts.max_tokens
    for begin in range(0, len(tokens), step):
        logits = runtime.forward([Piece(tokens[begin : begin + step], begin, pages)])
    float(logits[0, 0])


def _greedy(logits: Any) -> list[int]:
    found: list[int] = logits.argmax(-1).tolist()
    return found


def _pages(runtime: Runtime, number: int, batch: int, tokens: int) -> tuple[int, ...]:
    """Pages of sequence `number`; those of a window's model go round and round."""
    facts = runtime.facts
    needed = -(-tokens // PAGE)
    own = facts.pages // batch
    held = min(needed, own)
    return tuple(number * own + page % held for page in range(needed))


def _check(runtime: Runtime, plan: Plan) -> None:
    facts = runtime.facts
    longest = max((plan.prompt, *plan.contexts)) + plan.tokens + 1
    if longest > facts.context:
        raise BadRequest(
            f"{longest} tokens are to be held, the context is {facts.context}: give --context {longest}"
        )
    for batch in (1, *plan.batches):
        length = plan.prompt + plan.tokens + 1 if batch > 1 else longest
        needed = min(length, facts.window + facts.max_tokens if facts.window else length)
        if batch > facts.max_pieces or batch * -(-needed // PAGE) > facts.pages:
            raise BadRequest(
                f"{batch} sequences of {length} tokens do not fit {facts.pages} pages of {PAGE} and "
                f"{facts.max_pieces} at once: give --kv-tokens {batch * (needed + PAGE)} or fewer sequences"
            )
