"""Transformers' `generate` with our linears beside the same with GPTQModel's torch kernel, in turn, in one run.

    python benchmarks/cpu_transformers.py MODEL --peer PYTHON [--threads 2] [--repeats 5] [--new 32]

MODEL: a GPTQ folder of 4 or 8 bits. PYTHON: an interpreter of an environment with GPTQModel
(benchmarks/peer_gptqmodel.py says how to make one). Both load MODEL once, in one dtype, and then write --new
tokens greedily after a prompt of 32, by turns; medians of tokens a second are printed, prompt included, and
whether both said the same. Without --peer, ours alone; with --backend NAME, ours with another row of kernels.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

OURS = """
import quantmill.hf
quantmill.hf.register(options["backend"])
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(options["model"], dtype=getattr(torch, options["dtype"]))
"""
PEER = """
from gptqmodel import BACKEND, GPTQModel
kernel = BACKEND[options["kernel"]]
model = GPTQModel.load(options["model"], device="cpu", backend=kernel, dtype=getattr(torch, options["dtype"])).model
"""
BODY = """
import json, os, sys, time
os.environ["HF_HUB_OFFLINE"] = "1"
options = json.loads(sys.argv[1])
import torch
torch.set_num_threads(options["threads"])
{load}
model.eval()
ids = torch.tensor([[(7919 * i) % 20000 + 100 for i in range(32)]])
new = options["new"]
kinds = sorted({{type(m).__name__ for m in model.modules() if hasattr(m, "qweight")}})
print("ANSWER " + json.dumps(kinds), flush=True)
for line in sys.stdin:
    begin = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, use_cache=True,
                             max_new_tokens=new, min_new_tokens=new, pad_token_id=0)
    took = time.perf_counter() - begin
    print("ANSWER " + json.dumps({{"tok_s": new / took, "ids": out[0, 32:].tolist()}}), flush=True)
"""


class Side:
    """A process that has the model loaded and generates when told."""

    def __init__(self, python: str, load: str, options: dict[str, Any]) -> None:
        command = [python, "-c", BODY.format(load=load), json.dumps(options)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(command, text=True, **pipes)
        self.linears = self._answer()
        self.speeds: list[float] = []
        self.ids: list[int] = []

    def run(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        answer = self._answer()
        self.speeds.append(answer["tok_s"])
        self.ids = answer["ids"]

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
        errors = self.process.stderr.read() if self.process.stderr else ""
        sys.exit(f"a side ended: {errors[-800:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--peer")
    parser.add_argument("--peer-kernel", default="TORCH", help="a name of gptqmodel.BACKEND")
    parser.add_argument("--backend", help="a row of quantmill's kernels")
    parser.add_argument("--dtype", default="bfloat16", help="GPTQModel takes float16 and bfloat16 only")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--new", type=int, default=32)
    asked = parser.parse_args()
    options = {
        "model": str(asked.model.resolve()),
        "threads": asked.threads,
        "new": asked.new,
        "dtype": asked.dtype,
    }
    sides = {"quantmill": Side(sys.executable, OURS, {**options, "backend": asked.backend})}
    if asked.peer:
        sides["GPTQModel"] = Side(asked.peer, PEER, {**options, "kernel": asked.peer_kernel})
    for side in sides.values():
        side.run()  # kernels are compiled and memory is touched
        side.speeds.clear()
    for _ in range(asked.repeats):
        for side in sides.values():
            side.run()
    for name, side in sides.items():
        rates = ", ".join(f"{speed:.2f}" for speed in side.speeds)
        print(f"{name:10} {median(side.speeds):7.2f} tok/s (of {rates}), {', '.join(side.linears)}")
    if asked.peer:
        ours, theirs = sides["quantmill"], sides["GPTQModel"]
        same = sum(a == b for a, b in zip(ours.ids, theirs.ids, strict=True))
        print(
            f"ratio {median(ours.speeds) / median(theirs.speeds):.1f}; {same} of {asked.new} tokens the same"
        )


if __name__ == "__main__":
    main()
