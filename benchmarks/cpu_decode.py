"""Tokens a second of the CPU runtime beside llama.cpp's, in turn, in the same run.

    python benchmarks/cpu_decode.py MODEL --gguf FILE [--gguf FILE ...] --peer PYTHON [--threads 2] [--repeats 5]

MODEL: a quantised folder. FILE: the same model for llama.cpp, in any of its formats. PYTHON: an interpreter
that has the package xllamacpp; in an environment of its own, it is no dependency of ours. Every repeat reads a
prompt of 512 tokens and writes 128 more, greedily, with one side after the other; medians and the best are
printed, what share of a streaming read our decode reaches, and with --batch what several sequences give.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from quantmill.kernels.cpu.bandwidth import streaming_read
from quantmill.kernels.cpu.layout import Precision
from quantmill.kernels.cpu.pool import default_threads, shared_pool
from quantmill.runtime.cpu.runtime import CpuRuntime
from quantmill.runtime.interface import PAGE, Piece
from quantmill.runtime.single import SingleSequence

PEER = """
import json, sys
import xllamacpp
file, threads, prompt, new = sys.argv[1], *map(int, sys.argv[2:])
params = xllamacpp.CommonParams()
params.model.path = file
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
params.n_ctx, params.n_parallel, params.verbosity = prompt + new + 64, 1, 0
server = xllamacpp.Server(params)
request = {"prompt": [(7919 * i) % 20000 + 100 for i in range(prompt)], "n_predict": new, "temperature": 0,
           "cache_prompt": False, "ignore_eos": True}
answer = server.handle_completions(request)
answer = json.loads(answer) if isinstance(answer, str) else answer
print("TIMINGS " + json.dumps(answer["timings"]))
"""


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens a second."""

    prefill: float
    decode: float


def ours(sequence: SingleSequence, prompt: int, new: int) -> Speed:
    ids = [(7919 * i) % 20000 + 100 for i in range(prompt)]
    sequence.reset()
    begin = time.perf_counter()
    logits = sequence.read(ids)
    middle = time.perf_counter()
    for _ in range(new):
        logits = sequence.read([int(np.argmax(logits))])
    return Speed(prompt / (middle - begin), new / (time.perf_counter() - middle))


def batched(runtime: CpuRuntime, sequences: int, steps: int = 32) -> float:
    """Tokens a second of several sequences that decode together, after 64 tokens each."""
    pages = [[2 * i, 2 * i + 1] for i in range(sequences)]
    for own in pages:
        runtime.forward([Piece(list(range(100, 100 + PAGE)), 0, own)])
    begin = time.perf_counter()
    for step in range(steps):
        runtime.forward([Piece([500 + step], PAGE + step, own) for own in pages])
    return sequences * steps / (time.perf_counter() - begin)


def theirs(python: str, file: Path, threads: int, prompt: int, new: int) -> Speed:
    command = [python, "-c", PEER, str(file), str(threads), str(prompt), str(new)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("TIMINGS ")]
    if not lines:
        sys.exit(f"llama.cpp did not answer: {done.stderr[-500:]}")
    timings = json.loads(lines[-1].removeprefix("TIMINGS "))
    return Speed(timings["prompt_per_second"], timings["predicted_per_second"])


def report(name: str, speeds: list[Speed]) -> Speed:
    prefill, decode = [s.prefill for s in speeds], [s.decode for s in speeds]
    print(
        f"{name:20} prefill {median(prefill):7.0f} tok/s (best {max(prefill):.0f})   "
        f"decode {median(decode):6.1f} tok/s (best {max(decode):.1f})"
    )
    return Speed(median(prefill), median(decode))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--gguf", type=Path, action="append", default=[])
    parser.add_argument("--peer")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--batch", type=int, nargs="*", default=[])
    parser.add_argument("--precision", choices=[p.name.lower() for p in Precision])
    asked = parser.parse_args()
    precision = Precision[asked.precision.upper()] if asked.precision else None
    runtime = CpuRuntime.from_folder(asked.model, threads=asked.threads, precision=precision)
    sequence = SingleSequence(runtime)
    files = asked.gguf if asked.peer else []
    mine: list[Speed] = []
    peers: dict[Path, list[Speed]] = {file: [] for file in files}
    ours(sequence, asked.prompt, 8)
    reads = []
    for _ in range(asked.repeats):
        reads.append(streaming_read(shared_pool(asked.threads), repeats=1))
        mine.append(ours(sequence, asked.prompt, asked.new))
        for file in files:
            peers[file].append(theirs(asked.peer, file, asked.threads, asked.prompt, asked.new))
    print(f"{asked.threads} threads, {asked.repeats} repeats, load average {os.getloadavg()[0]:.1f}")
    speed = report(f"quantmill, {runtime.facts.name}", mine)
    bandwidth = runtime.facts.bytes_per_token * speed.decode
    print(
        f"    {bandwidth / 1e9:.1f} GB/s of weights, {bandwidth / median(reads):.2f} of a streaming read "
        f"({median(reads) / 1e9:.1f} GB/s)"
    )
    for file in files:
        peer = report(f"llama.cpp, {file.suffixes[-2].lstrip('.')}", peers[file])
        print(
            f"    ratio: prefill {speed.prefill / peer.prefill:.2f}  decode {speed.decode / peer.decode:.2f}"
        )
    for sequences in asked.batch:
        print(f"{sequences} sequences together: {batched(runtime, sequences):.0f} tok/s")


if __name__ == "__main__":
    main()
