"""Tokens a second of the CPU decoder beside llama.cpp's, in turn, in the same run.

    python benchmarks/cpu_decode.py MODEL --gguf FILE --peer PYTHON [--threads 2] [--repeats 5]

MODEL: a quantised folder. FILE: the same model for llama.cpp. PYTHON: an interpreter that has the package
xllamacpp; in an environment of its own, it is no dependency of ours. Every repeat reads a prompt of 512
tokens and writes 128 more, greedily, with one side and then the other; medians and the best are printed, and
what share of a streaming read our decode reaches.
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
from quantmill.runtime.cpu.decoder import CpuDecoder

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


def ours(decoder: CpuDecoder, prompt: int, new: int) -> Speed:
    ids = [(7919 * i) % 20000 + 100 for i in range(prompt)]
    decoder.reset()
    begin = time.perf_counter()
    logits = decoder.prefill(ids)
    middle = time.perf_counter()
    for _ in range(new):
        logits = decoder.step(int(np.argmax(logits)))
    return Speed(prompt / (middle - begin), new / (time.perf_counter() - middle))


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
        f"{name:10} prefill {median(prefill):7.0f} tok/s (best {max(prefill):.0f})   "
        f"decode {median(decode):6.1f} tok/s (best {max(decode):.1f})"
    )
    return Speed(median(prefill), median(decode))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--peer")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--precision", choices=[p.name.lower() for p in Precision])
    asked = parser.parse_args()
    precision = Precision[asked.precision.upper()] if asked.precision else None
    decoder = CpuDecoder.from_folder(asked.model, threads=asked.threads, precision=precision)
    sides: dict[str, list[Speed]] = {"quantmill": [], "llama.cpp": []}
    ours(decoder, asked.prompt, 8)
    reads = []
    for _ in range(asked.repeats):
        reads.append(streaming_read(shared_pool(asked.threads), repeats=1))
        sides["quantmill"].append(ours(decoder, asked.prompt, asked.new))
        if asked.gguf and asked.peer:
            their = theirs(asked.peer, asked.gguf, asked.threads, asked.prompt, asked.new)
            sides["llama.cpp"].append(their)
    print(f"{asked.threads} threads, {asked.repeats} repeats, load average {os.getloadavg()[0]:.1f}")
    mine = report("quantmill", sides["quantmill"])
    bandwidth = decoder.bytes_per_token * mine.decode
    print(
        f"           {bandwidth / 1e9:.1f} GB/s of weights, {bandwidth / median(reads):.2f} of a streaming read "
        f"({median(reads) / 1e9:.1f} GB/s)"
    )
    if sides["llama.cpp"]:
        peer = report("llama.cpp", sides["llama.cpp"])
        print(
            f"ratio      prefill {mine.prefill / peer.prefill:.2f}   decode {mine.decode / peer.decode:.2f}"
        )


if __name__ == "__main__":
    main()
