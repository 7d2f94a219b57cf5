"""Where a pass of the engine goes: the forward pass, sampling, and everything else.

    python benchmarks/engine_passes.py MODEL [--device cuda] [--rows 1 16 64] [--passes 60]

For every number of answers and kind of sampling: the pass as it is, and what of it was spent until the forward
pass was launched, until sampling was launched, and until the tokens were there. `left` is what is none of these:
scheduling and bookkeeping. The limit is `forward` of the second line, which waits after the forward pass: what the
GPU alone takes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from quantmill.runtime import engine as engine_module
from quantmill.runtime.engine import Engine
from quantmill.runtime.engine_types import Request
from quantmill.runtime.opening import open_runtime
from quantmill.types import SamplingParams

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0, "repetition_penalty": 1.0},
    "plain": {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0},
    "top_k, top_p": {"temperature": 0.8, "top_p": 0.95, "top_k": 40, "repetition_penalty": 1.0},
    "penalties": {},  # the command line's defaults
    "log probs": {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "logprobs": 2},
}


class Watch:
    """Takes the place of the runtime's forward pass and of the sampler, and times them."""

    def __init__(self, runtime: Any, wait: Callable[[], None]) -> None:
        self.spent = dict.fromkeys(("forward", "sampling", "tokens"), 0.0)
        self._forward, self._begin, self._wait = runtime.forward, engine_module.begin_rows, wait

    def forward(self, pieces: Any) -> Any:
        return self._timed("forward", lambda: (self._forward(pieces), self._wait())[0])

    def begin(self, *given: Any) -> Callable[[], Any]:
        drawing = self._timed("sampling", lambda: self._begin(*given))
        return lambda: self._timed("tokens", drawing)

    def _timed(self, what: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        found = work()
        self.spent[what] += time.perf_counter() - began
        return found


def measure(runtime: Any, rows: int, given: dict[str, Any], passes: int, waits: bool) -> str:
    engine = Engine(runtime)
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    most = passes + 40
    for i in range(rows):
        params = SamplingParams(max_new_tokens=most, seed=i, ignore_eos=True, **given)
        engine.add(Request(str(i), tuple(range(3, 67 + i)), params))
    while any(s.left > 1 for s in engine.scheduler):
        engine.step()
    for _ in range(5):
        engine.step()
    watch = Watch(runtime, wait if waits else lambda: None)
    forward, begin = runtime.forward, engine_module.begin_rows
    runtime.forward, engine_module.begin_rows = watch.forward, watch.begin
    try:
        wait()
        began = time.perf_counter()
        for _ in range(passes):
            engine.step()
        whole = time.perf_counter() - began
    finally:
        runtime.forward, engine_module.begin_rows = forward, begin
        for i in range(rows):
            engine.finish(str(i))
    left = whole - sum(watch.spent.values())
    parts = [f"{name} {1e3 * t / passes:.2f}" for name, t in {**watch.spent, "left": left}.items()]
    return f"{1e3 * whole / passes:7.2f} ms  ({', '.join(parts)})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--passes", type=int, default=60)
    args = parser.parse_args()
    runtime = open_runtime(args.model, device=args.device, kv_tokens=max(args.rows) * 512)
    print(runtime.facts.name, flush=True)
    for rows in args.rows:
        for kind, given in KINDS.items():
            for waits in (False, True):
                said = measure(runtime, rows, given, args.passes, waits)
                name = f"{rows} answers, {kind}" if not waits else "  waiting for the forward pass"
                print(f"{name:34s} {said}", flush=True)
    runtime.close()


if __name__ == "__main__":
    main()
