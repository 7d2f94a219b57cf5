"""`quantmill eval`: models, a text and perhaps the original -> reports, kept beside the weights."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import constants
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quantmill.commands.machine import pick_device, set_threads
from quantmill.console import Console, progress
from quantmill.errors import BadRequest
from quantmill.evaluate import (
    Array,
    Distance,
    Ratio,
    Scores,
    Versus,
    compare,
    report,
    report_to_json,
    score,
    token_windows,
)
from quantmill.files import read_json, write_json
from quantmill.manifest import update_manifest
from quantmill.quantize import calibration
from quantmill.quantize.ranks import Ranks, join, leave
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


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    """Reports by name, and the scores behind them, by which models of one run are compared."""

    reports: dict[str, EvalReport]
    scores: dict[str, Scores]


def measure(
    models: Mapping[str, str], against: str | None, protocol: Protocol, console: Console
) -> dict[str, EvalReport]:
    """Score models, named freely, on one text: `measure_scores` without the scores."""
    return measure_scores(models, against, protocol, console).reports


def measure_scores(
    models: Mapping[str, str], against: str | None, protocol: Protocol, console: Console
) -> Measured:
    """Score models, named freely, on one text. `models` maps a name to a folder, file or repository.

    All of them and the original are in memory together, so that the original runs once per window. Started by
    torchrun, every rank scores its share of the windows; all have all scores in the end, and the first keeps them.
    """
    set_threads(protocol.threads)
    device = pick_device(protocol.device)
    ranks = join(device)
    if ranks.size > 1 and device == "cuda":
        device = f"cuda:{torch.cuda.current_device()}"
    folders = {name: resolve(model, notify=console.note, run=True) for name, model in models.items()}
    base = None if against is None else resolve(against, notify=console.note)
    tokenizer = load_tokenizer(next(iter(folders.values())))
    text = calibration.read_text(protocol.text, tokenizer)
    ids = tokenise(tokenizer, text)
    original = None if base is None else load_model(base, device=device)
    loaded = {name: load_model(folder, device=device) for name, folder in folders.items()}
    _refuse_long_windows(protocol.ctx, loaded)
    _warn_of_shared_text(folders, protocol.text, ids, tokenizer, console)
    cut = token_windows(ids, ctx=protocol.ctx, windows=protocol.windows)
    _refuse_unspread(cut, protocol, ranks)
    with progress("scoring", 1000) if ranks.first else nullcontext(_silent) as advance:
        own = score(
            loaded,
            cut[ranks.rank :: ranks.size],
            original=original,
            progress=lambda done, passes: advance(1000 * done // passes - 1000 * (done - 1) // passes, ""),
        )
    scores = _joined(ranks.gathered(own))
    leave(ranks)
    named = {"text": Path(protocol.text).name, "text_sha256": hashlib.sha256(text.encode()).hexdigest()}
    reports = {name: report(scores[name], **named) for name in models}
    for name, folder in folders.items():
        if ranks.first and protocol.save:
            _keep(folder, reports[name], console)
    return Measured(reports, scores)


def _keep(folder: Path, report: EvalReport, console: Console) -> None:
    """Put the report beside the weights for the card, where they were made here; else say why it is not kept."""
    if not (folder / QUANTIZE_REPORT).exists():
        return
    if folder.is_relative_to(constants.HF_HUB_CACHE):  # what the hub sent stays as it was sent
        return
    try:
        kept = read_json(folder / EVAL_REPORT) if (folder / EVAL_REPORT).exists() else {}
        if report.mean_kl is None and kept.get("mean_kl") is not None:
            console.note(f"{folder / EVAL_REPORT} stays: it knows the KL, this run had no --against")
            return
        write_json(folder / EVAL_REPORT, report_to_json(report))
        update_manifest(folder, (EVAL_REPORT,))
    except OSError as error:
        console.note(f"not kept for the card, {folder} cannot be written to ({error.strerror}): --no-save")


def _silent(steps: int, remark: str) -> None:
    """The progress of a rank that does not speak."""


def _refuse_unspread(cut: torch.Tensor, protocol: Protocol, ranks: Ranks) -> None:
    """Ranks that were not given alike, or would have nothing to do."""
    if ranks.size == 1:
        return
    ids = hashlib.sha256(cut.numpy().tobytes()).hexdigest()
    ranks.refuse_unless_alike(f"{ids} {protocol.ctx}", "text or settings")
    if len(cut) < ranks.size:
        raise BadRequest(
            f"{len(cut)} windows cannot be spread over {ranks.size} ranks: use --windows {ranks.size}"
        )


def _joined(parts: Sequence[Mapping[str, Scores]]) -> dict[str, Scores]:
    """Scores of all windows from those of the ranks, rank r having every len(parts)-th from r on."""
    return {name: _woven([p[name] for p in parts]) for name in parts[0]}


def _woven(parts: Sequence[Scores]) -> Scores:
    def weave(arrays: Sequence[Array]) -> Array:
        whole = np.empty((sum(map(len, arrays)), *arrays[0].shape[1:]))
        for rank, array in enumerate(arrays):
            whole[rank :: len(arrays)] = array
        return whole

    distances = [p.distance for p in parts if p.distance is not None]
    fields = [weave(columns) for columns in zip(*map(_columns, distances), strict=True)]
    return Scores(weave([p.nll for p in parts]), Distance(*fields) if fields else None)


def _columns(distance: Distance) -> list[Array]:
    return [getattr(distance, field.name) for field in dataclasses.fields(distance)]


def versus(
    model: str, other: str, against: str | None, protocol: Protocol, console: Console
) -> tuple[dict[str, EvalReport], Versus]:
    """Both models' reports, by what was typed, and the first beside the second on the same windows.

    Raises BadRequest where both are the same.
    """
    if model == other:
        raise BadRequest(f"--versus {other} is the model itself: name another variant")
    measured = measure_scores({model: model, other: other}, against, protocol, console)
    return measured.reports, compare(measured.scores[model], measured.scores[other])


def _warn_of_shared_text(
    folders: Mapping[str, Path],
    text: str,
    ids: torch.Tensor,
    tokenizer: PreTrainedTokenizerBase,
    console: Console,
) -> None:
    for name, folder in folders.items():
        if (share := shared_text(folder, text, ids, tokenizer)) > SAME_TEXT:
            console.note(
                f"warning: {share:.0%} of what {name} was calibrated on is in this text, which flatters it"
            )


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
    if report.mean_kl is not None and report.original_perplexity is not None:
        lines += [
            f"original        {report.original_perplexity:.3f}, "
            f"ratio {_ends(report.perplexity_ratio, report.perplexity_ratio_ci, 4)}",
            f"mean KL         {_ends(report.mean_kl, report.mean_kl_ci, 5)} nats/token",
            f"KL quantiles    median {report.median_kl:.5f}, 99 % {report.p99_kl:.4f}, "
            f"99.9 % {report.p999_kl:.4f}, max {report.max_kl:.3f}",
            f"top-1 agreement {_ends(report.top1_agreement, report.top1_agreement_ci, 4)}",
            f"change of p     RMS {_ends(report.rms_delta_p, report.rms_delta_p_ci, 4)}, "
            f"mean {report.mean_delta_p:+.4f}",
        ]
    return [
        *lines,
        f"scored          {report.tokens} tokens of {report.text}",
        f"protocol        {report.protocol}",
    ]


def _ends(value: float | None, interval: tuple[float, float] | None, digits: int) -> str:
    """A value with its 95 % interval, where there is one."""
    shown = f"{value:.{digits}f}"
    return shown if interval is None else f"{shown} ({interval[0]:.{digits}f} to {interval[1]:.{digits}f})"


def versus_lines(other: str, found: Versus) -> list[str]:
    """A comparison for people: paired 95 % intervals."""

    def ratio(r: Ratio) -> str:
        return _ends(r.value, (r.low, r.high), 4)

    lines = [f"versus          {other}", f"perplexity      x {ratio(found.perplexity_ratio)}"]
    if found.kl_ratio is not None and found.top1_difference is not None:
        lines += [
            f"mean KL         x {ratio(found.kl_ratio)}",
            f"top-1 agreement {ratio(found.top1_difference)} more",
        ]
    return lines
