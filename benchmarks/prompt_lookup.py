"""Guessing from the text itself beside writing token by token, on texts that repeat themselves and others.

    python benchmarks/prompt_lookup.py MODEL [--device auto] [--tokens 256] [--text README.md]

Both loops draw on the host from the same runtime's logits, so the ratio is what guessing changes. Prints tokens a
second of both, their ratio, how many guesses held, and whether the answers are equal, token for token.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from quantmill.runtime.interface import Runtime
from quantmill.runtime.lookup import Tally, generate_ahead
from quantmill.runtime.opening import open_runtime
from quantmill.runtime.sampling import SamplerState, sample_rows
from quantmill.runtime.single import SingleSequence
from quantmill.runtime.tokenizer import open_tokenizer
from quantmill.types import SamplingParams

GREEDY = SamplingParams(temperature=0, repetition_penalty=1)
WARM = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1, seed=3)
ROUNDS = 3


def plainly(runtime: Runtime, ids: list[int], state: SamplerState, count: int) -> Iterator[int]:
    sequence = SingleSequence(runtime)
    logits = sequence.read(ids)
    for left in range(count, 0, -1):
        token = sample_rows(logits, [state])[0].token
        yield token
        if left > 1:
            logits = sequence.read([token])


def ahead(runtime: Runtime, ids: list[int], state: SamplerState, count: int, tally: Tally) -> Iterator[int]:
    draw = lambda row: sample_rows(row, [state])[0].token  # noqa: E731
    return generate_ahead(SingleSequence(runtime), ids, draw, most=count, tally=tally)


def timed(make: Callable[[], Iterator[int]]) -> tuple[list[int], float]:
    """The answer, and tokens a second after the first of them; the best of some rounds."""
    best = 0.0
    for _ in range(ROUNDS):
        answer = make()
        found = [next(answer)]
        begin = time.perf_counter()
        found += answer
        best = max(best, (len(found) - 1) / (time.perf_counter() - begin))
    return found, best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--text", type=Path, default=Path("README.md"))
    asked = parser.parse_args()
    runtime = open_runtime(asked.model, device=asked.device, context=2048, kv_tokens=2048)
    text = open_tokenizer(asked.model).encode(asked.text.read_text())[:300]
    cases = {
        "does not repeat": (text, WARM),
        "repeats itself": (text * 3 + text[:40], GREEDY),
        "greedy": (text, GREEDY),
    }
    print(runtime.facts.name)
    for name, (ids, params) in cases.items():
        count, tally = asked.tokens, Tally()
        one, slow = timed(lambda i=ids, p=params, count=count: plainly(runtime, i, SamplerState(p, i), count))
        two, fast = timed(
            lambda i=ids, p=params, t=tally, count=count: ahead(runtime, i, SamplerState(p, i), count, t)
        )
        print(
            f"{name:16} one by one {slow:7.1f} tok/s, ahead {fast:7.1f} tok/s, ratio {fast / slow:.2f}; "
            f"{tally.right} of {tally.guessed} guesses held, {ROUNDS * count / tally.passes:.2f} tokens a pass; "
            f"{'equal' if one == two else 'DIFFERENT'}",
            flush=True,
        )


if __name__ == "__main__":
    main()
