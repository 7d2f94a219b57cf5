"""What rounding the factors of calibration's products costs: KL of the small real model, by number format.

    python benchmarks/gpu_precision.py SOURCE BLOCKS.npy TEST.npy [--device cuda] [--windows 24] [--bits 4 3]

BLOCKS (samples, length) and TEST (n,) hold token ids of SOURCE's tokenizer. Every row quantises the model
with group 64, then scores it in float32 against the original. `forward` is what linears and attention
multiply in, `Hessian` what x x^T does; sums are float32 throughout. The float32 row is the reference.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from quantmill import evaluate
from quantmill.checkpoint import open_checkpoint
from quantmill.formats.gptq import dequantize
from quantmill.quantize import arithmetic, block_step, calibration, hessian, pipeline, shell
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
    ("float32", "float16"),
    ("float32", "bfloat16"),
    ("float16", "float16"),
    ("bfloat16", "bfloat16"),
)
add_products = arithmetic.add_products


def use(forward: str, inputs: str) -> None:
    """From now on calibrate in these formats."""
    for module in (arithmetic, block_step, shell):
        module.matmul_dtype = lambda device: FORMATS[forward]

    def add(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
        left, right = (x.to(FORMATS[inputs]) for x in (left, right))
        if inputs == "tf32":
            with arithmetic.tensor_cores():
                total.addmm_(left.T, right)
        else:
            add_products(total, left, right)

    hessian.add_products = add


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
    asked = parser.parse_args()
    blocks, ids = (torch.from_numpy(np.load(f).astype(np.int64)) for f in (asked.blocks, asked.test))
    data = CalibrationSet(blocks, "blocks", 0, calibration.fingerprint(blocks), len(blocks), 0)
    original, student = (
        AutoModelForCausalLM.from_pretrained(asked.source, dtype=torch.float32).to(asked.device).eval()
        for _ in range(2)
    )
    for bits in asked.bits:
        for forward, inputs in ROWS:
            use(forward, inputs)
            with tempfile.TemporaryDirectory() as scratch:
                measure(asked, data, ids, bits, f"{forward:9} {inputs:9}", Path(scratch), original, student)


def measure(asked, data, ids, bits, label, scratch, original, student) -> None:
    began = time.perf_counter()
    variant = Variant("x", QuantConfig(bits=bits, group_size=64))
    job = Job(
        source=asked.source, source_name="small", out=scratch, variants=(variant,), calibration=data,
        device=asked.device,
    )  # fmt: skip
    done = pipeline.quantize(job, lambda _: None)[0]
    seconds = time.perf_counter() - began
    made = open_checkpoint(done.folder)
    for name in made.quantized_modules():
        weight = student.get_submodule(name).weight
        weight.data.copy_(dequantize(made.packed(name), torch.float32))
    report = evaluate.evaluate(
        {"x": student}, ids.flatten(), original=original, ctx=1024, windows=asked.windows
    )["x"]
    low, high = report.mean_kl_ci
    kl = f"KL {report.mean_kl:.5f} ({low:.5f}-{high:.5f})"
    loss = sum(m.loss for m in done.modules)
    print(f"{bits} bits  {label}  {kl}  layer loss {loss:.4f}  {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
