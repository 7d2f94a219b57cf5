"""`quantmill eval`: models, a text and perhaps the original -> reports, kept beside the weights."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quantmill.commands.machine import pick_device, set_threads
from quantmill.console import Console, progress
from quantmill.errors import BadRequest
from quantmill.evaluate import evaluate, report_to_json
from quantmill.files import write_json
from quantmill.quantize import calibration
from quantmill.runtime.load import load_model, load_tokenizer
from quantmill.sources import resolve
from quantmill.types import EvalReport

EVAL_REPORT = "eval_report.json"
QUANTIZE_REPORT = "quantize_report.json"
OFFLINE = ("python-docs", "python-library")  # sets that can be rebuilt anywhere, to be compared
SAME_TEXT = 0.05  # two parts of one corpus share a thousandth


@dataclasses.dataclass(frozen=True, slots=True)
class Protocol:
    """What is scored, and how much of it."""

    text: str
    ctx: int
    windows: int
    device: str = "auto"
    threads: int | None = None
    save: bool = True


def measure(
    models: Mapping[str, str], against: str | None, protocol: Protocol, console: Console
) -> dict[str, EvalReport]:
    """Score models, named freely, on one text. `models` maps a name to a folder, file or repository.

    All of them and the original are in memory together, so that the original runs once per window.
    """
    set_threads(protocol.threads)
    device = pick_device(protocol.device)
    folders = {name: resolve(model, notify=console.note) for name, model in models.items()}
    tokenizer = load_tokenizer(next(iter(folders.values())))
    text = calibration.read_text(protocol.text, tokenizer)
    ids = tokenise(tokenizer, text)
    original = None if against is None else load_model(resolve(against, notify=console.note), device=device)
    loaded = {name: load_model(folder, device=device) for name, folder in folders.items()}
    _refuse_long_windows(protocol.ctx, loaded)
    for name, folder in folders.items():
        if (share := shared_text(folder, protocol.text, ids, tokenizer)) > SAME_TEXT:
            console.note(
                f"warning: {share:.0%} of what {name} was calibrated on is in this text, which flatters it"
            )
    with progress("scoring", 1000) as advance:
        reports = evaluate(
            loaded,
            ids,
            original=original,
            ctx=protocol.ctx,
            windows=protocol.windows,
            text=Path(protocol.text).name,
            text_sha256=hashlib.sha256(text.encode()).hexdigest(),
            progress=lambda done, passes: advance(1000 * done // passes - 1000 * (done - 1) // passes, ""),
        )
    for name, folder in folders.items():
        if protocol.save and (folder / QUANTIZE_REPORT).exists():
            write_json(folder / EVAL_REPORT, report_to_json(reports[name]))
    return reports


def tokenise(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """Token ids (T,) int64 of a whole text, tokenised once."""
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def _refuse_long_windows(ctx: int, models: Mapping[str, PreTrainedModel]) -> None:
    for name, model in models.items():
        positions = getattr(model.config, "max_position_embeddings", None)
        if isinstance(positions, int) and ctx > positions:
            raise BadRequest(f"{name} takes {positions} tokens at most: use --ctx {positions} or less")


def shared_text(folder: Path, text: str, ids: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> float:
    """How much of a model's calibration text (0 to 1) is in the text to be scored, as far as its report tells."""
    report = folder / QUANTIZE_REPORT
    if not report.exists():
        return 0.0
    made = json.loads(report.read_text())["calibration"]
    if made["dataset"] not in OFFLINE:
        return float(made["dataset"] == Path(text).name)
    samples, seqlen, seed = made["samples_drawn"], made["seqlen"], made["seed"]
    blocks = calibration.build(made["dataset"], tokenizer, seqlen=seqlen, samples=samples, seed=seed).blocks
    return calibration.overlap(blocks, ids)


def report_lines(report: EvalReport) -> list[str]:
    """A report for people."""
    lines = [f"perplexity      {report.perplexity:.3f}"]
    if (
        report.mean_kl is not None
        and report.mean_kl_ci is not None
        and report.original_perplexity is not None
    ):
        low, high = report.mean_kl_ci
        lines += [
            f"original        {report.original_perplexity:.3f}",
            f"mean KL         {report.mean_kl:.5f} nats/token (95 %: {low:.5f} to {high:.5f})",
            f"KL quantiles    median {report.median_kl:.5f}, 99 % {report.p99_kl:.4f}, "
            f"99.9 % {report.p999_kl:.4f}, max {report.max_kl:.3f}",
            f"top-1 agreement {report.top1_agreement:.4f}",
            f"RMS change of p {report.rms_delta_p:.4f}",
        ]
    return [
        *lines,
        f"scored          {report.tokens} tokens of {report.text}",
        f"protocol        {report.protocol}",
    ]
