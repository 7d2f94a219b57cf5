"""What rounding the factors of calibration's products costs: KL of the small real model, by number format.

    python benchmarks/gpu_precision.py SOURCE BLOCKS.npy TEST.npy [--device cuda] [--sets 4] [--windows 24]
                                       [--bits 4 3] [--preset fast]
                                       [--formats float32 bfloat16]

BLOCKS (samples, length) and TEST (n,) hold token ids of SOURCE's tokenizer. Every row quantises the model
with group 64, then scores it in float32 against the original: mean KL over all positions of the first
windows of 1024. `forward` is what linears and attention multiply in, `Hessian` what x x^T does; sums are
float32 throughout. The float32 row is the reference. A flipped tie early on changes every code after it, so
one run tells little: the blocks are cut into `--sets`, each calibrated on by itself (in a process of its
own), and the table holds means over sets, with the standard error of the paired ratios to the reference.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from quantmill.checkpoint import open_checkpoint
from quantmill.formats.gptq import dequantize
from quantmill.quantize import (
    arithmetic,
    best_step,
    block_step,
    calibration,
    hessian,
    moments,
    pipeline,
    shell,
)
from quantmill.quantize.job import Job
from quantmill.types import CalibrationSet, QuantConfig, Variant

FORMATS = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
ROWS = (  # forward, Hessian
    ("float32", "float32"),
    ("float32", "tf32"),
    ("float16", "float16"),
    ("bfloat16", "bfloat16"),
    ("float32", "bfloat16"),
)
CTX = 1024
add_products = arithmetic.add_products


def use(forward: str, inputs: str) -> None:
    """From now on calibrate in these formats."""
    for module in (arithmetic, best_step, block_step, shell):
        module.matmul_dtype = lambda device: FORMATS[forward]

    def add(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
        left, right = (x.to(FORMATS[inputs]) for x in (left, right))
        if inputs == "tf32":
            with arithmetic.tensor_cores():
                total.addmm_(left.T, right)
        else:
            add_products(total, left, right)

    for module in (hessian, moments):
        module.add_products = add


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("blocks", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--sets", type=int, default=4)
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.only is None:
        print_table(run_sets(asked.sets))
    else:
        measure_set(asked)


def run_sets(sets: int) -> list[dict]:
    """Every set in a process of its own, all at once; what they print as JSON."""
    runs = [
        subprocess.Popen([sys.executable, *sys.argv, "--only", str(i)], stdout=subprocess.PIPE, text=True)
        for i in range(sets)
    ]
    return [json.loads(line) for run in runs for line in run.communicate()[0].splitlines()]


def print_table(found: list[dict]) -> None:
    rows = list(dict.fromkeys((r["bits"], r["forward"], r["hessian"]) for r in found))
    for bits, forward, inputs in rows:
        kl = {
            r["set"]: r["kl"]
            for r in found
            if (r["bits"], r["forward"], r["hessian"]) == (bits, forward, inputs)
        }
        reference = {
            r["set"]: r["kl"] for r in found if (r["bits"], r["forward"], r["hessian"]) == (bits, *ROWS[0])
        }
        ratios = [math.log(kl[s] / reference[s]) for s in kl if s in reference]
        spread = statistics.stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 1 else float("nan")
        print(
            f"{bits} bits  forward {forward:9} Hessian {inputs:9} KL {statistics.mean(kl.values()):.5f}  "
            f"ratio {math.exp(statistics.mean(ratios)):.4f} +- {spread:.4f}  ({len(kl)} sets)",
            flush=True,
        )


def measure_set(asked: argparse.Namespace) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    blocks, ids = (torch.from_numpy(np.load(f).astype(np.int64)) for f in (asked.blocks, asked.test))
    blocks = torch.chunk(blocks, asked.sets)[asked.only]
    data = CalibrationSet(blocks, "blocks", 0, calibration.fingerprint(blocks), len(blocks), 0)
    student = AutoModelForCausalLM.from_pretrained(asked.source, dtype=torch.float32).to(asked.device).eval()
    windows = ids.flatten()[: asked.windows * CTX].view(-1, CTX).to(asked.device)
    with torch.inference_mode():
        wanted = [torch.log_softmax(student(w[None]).logits[0, :-1], -1) for w in windows]
    for bits in asked.bits:
        for forward, inputs in (row for row in ROWS if {*row} <= {*asked.formats}):
            use(forward, inputs)
            began = time.perf_counter()
            with tempfile.TemporaryDirectory() as scratch:
                losses = put_quantised(asked, data, bits, Path(scratch), student)
            seconds = time.perf_counter() - began
            row = {"set": asked.only, "bits": bits, "forward": forward, "hessian": inputs}
            row |= {"kl": mean_kl(student, windows, wanted), "loss": losses, "seconds": round(seconds, 1)}
            print(json.dumps(row), flush=True)
            print(row, file=sys.stderr, flush=True)


def put_quantised(asked, data: CalibrationSet, bits: int, scratch: Path, student) -> float:
    """Quantise, and give `student` the weights that the files stand for; the sum of all layers' losses."""
    variant = Variant("x", QuantConfig(bits=bits, group_size=64))
    job = Job(
        source=asked.source, source_name="small", out=scratch, variants=(variant,), calibration=data,
        device=asked.device, preset=asked.preset,
    )  # fmt: skip
    done = pipeline.quantize(job, lambda _: None)[0]
    made = open_checkpoint(done.folder)
    for name in made.quantized_modules():
        weight = student.get_submodule(name).weight
        weight.data.copy_(dequantize(made.packed(name), torch.float32))
    return sum(m.loss for m in done.modules)


def mean_kl(student, windows: torch.Tensor, wanted: list[torch.Tensor]) -> float:
    """KL(original || student) in nats per token, over all scored positions."""
    total = 0.0
    with torch.inference_mode():
        for window, log_p in zip(windows, wanted, strict=True):
            log_q = torch.log_softmax(student(window[None]).logits[0, :-1], -1)
            total += float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    return total / len(windows)


if __name__ == "__main__":
    main()
