"""How far quantised models are from the original on one text: token ids and models in, EvalReports out.

    token ids -> windows -> scores of every position -> means, quantiles, confidence intervals

Knows no folders, no text and no layers: a model is anything that answers `model(input_ids).logits`. Memory:
the logits of two models for one window, and CHUNK_BYTES.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quantmill.errors import BadCheckpoint, BadRequest, BadText
from quantmill.types import EvalReport, Json

CHUNK_BYTES = 96 << 20
BYTES_PER_LOGIT = (
    32  # two log-softmaxes, a probability and a product in float32, and one more widened to float64
)
RESAMPLES = 1000
ENOUGH_WINDOWS = 8  # from so many on a bootstrap block is a window ...
BLOCK_POSITIONS = 64  # ... below, so many consecutive positions of one

Array = npt.NDArray[np.float64]


class Model(Protocol):
    """A causal language model: (1, ctx) int64 -> an object whose `logits` are (1, ctx, vocabulary)."""

    def __call__(self, input_ids: Tensor) -> Any: ...


@dataclass(frozen=True, slots=True)
class Distance:
    """How one model differs from the original at every scored position; arrays (W, ctx - 1)."""

    original_nll: Array  # of the token that came, nats
    kl: Array  # KL(original || this), nats
    same_top1: Array  # 1 where both rank the same token first
    delta_p: Array  # probability of the token that came, minus the original's


@dataclass(frozen=True, slots=True)
class Scores:
    """What one model did at every scored position."""

    nll: Array  # (W, ctx - 1), of the token that came, nats
    distance: Distance | None = None  # where an original was given


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio of two means, or a difference, with its 95 % confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Versus:
    """One model beside another on the same windows: every interval is paired, what is hard in the text cancels."""

    perplexity_ratio: Ratio
    kl_ratio: Ratio | None = None  # of mean KL to the original; below 1, the first is closer
    top1_difference: Ratio | None = None  # of top-1 agreement, first minus second


def evaluate(
    models: Mapping[str, Model],
    ids: Tensor,
    *,
    original: Model | None = None,
    ctx: int = 1024,
    windows: int | None = 6,
    text: str = "",
    text_sha256: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, EvalReport]:
    """Score every model on the same windows of `ids` (T,) int64; `windows` None takes the whole text.

    `text` and `text_sha256` are only written down. `progress` is told (forward passes done, of how many).
    Raises BadRequest (impossible numbers), BadText (too little text) and BadCheckpoint (NaN or infinite
    logits, or vocabularies that differ).
    """
    cut = token_windows(ids, ctx=ctx, windows=windows)
    scores = score(models, cut, original=original, progress=progress)
    return {name: report(scores[name], text=text, text_sha256=text_sha256) for name in models}


def token_windows(ids: Tensor, *, ctx: int, windows: int | None) -> Tensor:
    """The first `windows` non-overlapping windows of `ids` (T,): (W, ctx) int64; fewer if the text ends."""
    if ctx < 2 or (windows is not None and windows < 1):
        raise BadRequest(f"ctx {ctx} with {windows} windows cannot be scored: use --ctx 1024 --windows 6")
    if ids.numel() < 2:
        raise BadText(f"the text holds {ids.numel()} tokens, so nothing can be predicted: give a longer one")
    count = ids.numel() // ctx
    if count == 0:
        cure = f"use --ctx {1 << (ids.numel().bit_length() - 1)} or more text"
        raise BadText(f"the text holds {ids.numel()} tokens, less than one window of {ctx}: {cure}")
    kept = count if windows is None else min(windows, count)
    return ids[: kept * ctx].view(kept, ctx).to(torch.int64)


def score(
    models: Mapping[str, Model],
    cut: Tensor,
    *,
    original: Model | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Scores]:
    """Scores of every model on windows `cut` (W, ctx); the original runs once per window for all of them."""
    passes = len(cut) * (len(models) + (original is not None))
    done = 0
    kept: dict[str, list[Tensor]] = {name: [] for name in models}

    def run(name: str, model: Model, number: int) -> Tensor:
        nonlocal done
        logits = _logits(name, model, cut[number], number)
        done += 1
        if progress:
            progress(done, passes)
        return logits

    with torch.inference_mode():
        for number, window in enumerate(cut):
            reference = None if original is None else run("the original", original, number)
            for name, model in models.items():
                kept[name].append(_score_window(name, run(name, model, number), reference, window))
    return {name: _as_scores(torch.stack(windows)) for name, windows in kept.items()}


def report(scores: Scores, *, text: str = "", text_sha256: str = "") -> EvalReport:
    """Means, quantiles and the confidence interval of one model's scores."""
    count, width = scores.nll.shape
    plain = EvalReport(
        perplexity=math.exp(scores.nll.mean()),
        tokens=scores.nll.size,
        windows=count,
        ctx=width + 1,
        text=text,
        text_sha256=text_sha256,
        protocol=protocol(count, width + 1),
    )
    return _with_distance(plain, scores.nll, scores.distance) if scores.distance else plain


def _with_distance(plain: EvalReport, nll: Array, distance: Distance) -> EvalReport:
    median, p99, p999, most = (float(q) for q in np.quantile(distance.kl, (0.5, 0.99, 0.999, 1.0)))
    squares = np.square(distance.delta_p)
    rms = mean_interval(squares)
    growth = nll - distance.original_nll
    ends = mean_interval(growth)
    return dataclasses.replace(
        plain,
        original_perplexity=math.exp(distance.original_nll.mean()),
        mean_kl=float(distance.kl.mean()),
        mean_kl_ci=mean_interval(distance.kl),
        median_kl=median,
        p99_kl=p99,
        p999_kl=p999,
        max_kl=most,
        top1_agreement=float(distance.same_top1.mean()),
        rms_delta_p=float(np.sqrt(squares.mean())),
        top1_agreement_ci=mean_interval(distance.same_top1),
        rms_delta_p_ci=None if rms is None else (math.sqrt(rms[0]), math.sqrt(rms[1])),
        mean_delta_p=float(distance.delta_p.mean()),
        perplexity_ratio=math.exp(growth.mean()),
        perplexity_ratio_ci=None if ends is None else (math.exp(ends[0]), math.exp(ends[1])),
    )


def protocol(windows: int, ctx: int) -> str:
    """How the numbers came about, in one sentence: figures of different protocols must not be compared."""
    blocks = "windows" if windows >= ENOUGH_WINDOWS else f"{BLOCK_POSITIONS} consecutive positions"
    return (
        "text tokenised once, with no special token but what the tokenizer puts at its start; the first "
        f"{windows} non-overlapping windows of {ctx} tokens, positions 2 to {ctx} of each scored from those "
        "before them in the window; log-softmax in float32, sums in float64; KL(original || quantised) in "
        f"nats per token with a 95 % percentile bootstrap interval, {RESAMPLES} resamples of {blocks}, seed 0"
    )


# ---- one window


def _logits(name: str, model: Model, window: Tensor, number: int) -> Tensor:
    """(ctx, vocabulary), in the model's dtype and on its device."""
    device = getattr(model, "device", "cpu")
    logits: Tensor = model(window[None].to(device)).logits[0]
    if not torch.isfinite(torch.stack(torch.aminmax(logits))).all():
        raise BadCheckpoint(
            f"{name} gives NaN or infinite logits in window {number + 1}: run quantmill check on it"
        )
    return logits


def _score_window(name: str, logits: Tensor, reference: Tensor | None, window: Tensor) -> Tensor:
    """(ctx - 1, 1 or 5) float64 on the CPU: nll, then the columns of Distance."""
    if reference is not None and reference.shape != logits.shape:
        sizes = f"{logits.shape[-1]} tokens, the original {reference.shape[-1]}"
        raise BadCheckpoint(f"{name} has a vocabulary of {sizes}: give the model that it was made from")
    targets = window.to(logits.device)[1:]
    chunks = (
        _score_chunk(logits[part], None if reference is None else reference[part], targets[part])
        for part in _chunks(len(targets), logits.shape[-1])
    )
    return torch.cat([chunk.cpu() for chunk in chunks])


def _chunks(positions: int, vocabulary: int) -> Iterator[slice]:
    rows = max(1, CHUNK_BYTES // (BYTES_PER_LOGIT * vocabulary))
    return (slice(start, min(start + rows, positions)) for start in range(0, positions, rows))


def _score_chunk(logits: Tensor, reference: Tensor | None, targets: Tensor) -> Tensor:
    """(rows, V), (rows, V), (rows,) -> (rows, 1 or 5) float64."""
    log_q = torch.log_softmax(logits.float(), -1)
    nll = -_pick(log_q, targets)
    if reference is None:
        return nll[:, None]
    log_p = torch.log_softmax(reference.to(logits.device).float(), -1)
    original_nll = -_pick(log_p, targets)
    same_top1 = (log_q.argmax(-1) == log_p.argmax(-1)).double()
    kl = (log_p.exp() * log_q.neg_().add_(log_p)).sum(-1, dtype=torch.float64)
    return torch.stack([nll, original_nll, kl, same_top1, (-nll).exp() - (-original_nll).exp()], -1)


def _pick(log_p: Tensor, targets: Tensor) -> Tensor:
    return log_p.gather(-1, targets[:, None])[:, 0].double()


def _as_scores(values: Tensor) -> Scores:
    """(W, ctx - 1, 1 or 5), one array per column."""
    nll, *others = np.moveaxis(values.numpy(), -1, 0)
    return Scores(nll, Distance(*others) if others else None)


# ---- confidence intervals


def mean_interval(values: Array) -> tuple[float, float] | None:
    """95 % interval of the mean of `values` (W, positions) by block bootstrap; None with a single block.

    Tokens near each other are correlated, so blocks are resampled (Künsch 1989): whole windows where there
    are enough of them, else runs of BLOCK_POSITIONS within a window.
    """
    sums, counts = _block_sums(values)
    if len(counts) < 2:
        return None
    draws = _draws(len(counts))
    low, high = np.quantile(sums[draws].sum(-1) / counts[draws].sum(-1), (0.025, 0.975))
    return float(low), float(high)


def paired_ratio(a: Array, b: Array) -> Ratio:
    """mean(a) / mean(b) of two models scored on the same windows (W, positions), with its paired interval.

    Both means come from the same resampled blocks, so that what is hard in the text cancels. Raises
    BadRequest when the windows differ, when b is zero throughout or when there is a single block.
    """
    if a.shape != b.shape:
        raise BadRequest(f"windows {a.shape} and {b.shape} cannot be paired: score both in one run")
    (sums_a, counts), (sums_b, _) = _block_sums(a), _block_sums(b)
    draws = _draws(len(counts))
    below = sums_b[draws].sum(-1)
    if len(counts) < 2 or not below.all():
        raise BadRequest("too little text for the ratio of two losses: use --windows 6 or more")
    low, high = np.quantile(sums_a[draws].sum(-1) / below, (0.025, 0.975))
    return Ratio(float(sums_a.sum() / sums_b.sum()), float(low), float(high))


def compare(a: Scores, b: Scores) -> Versus:
    """Two models scored in one run. Raises BadRequest as paired_ratio does."""
    growth = _difference(a.nll, b.nll)
    ratio = Ratio(*(math.exp(end) for end in (growth.value, growth.low, growth.high)))
    if a.distance is None or b.distance is None:
        return Versus(ratio)
    kl = paired_ratio(a.distance.kl, b.distance.kl)
    return Versus(ratio, kl, _difference(a.distance.same_top1, b.distance.same_top1))


def _difference(a: Array, b: Array) -> Ratio:
    """Difference of two means with its paired interval."""
    if a.shape != b.shape:
        raise BadRequest(f"windows {a.shape} and {b.shape} cannot be paired: score both in one run")
    ends = mean_interval(a - b)
    if ends is None:
        raise BadRequest("too little text for an interval: use --windows 6 or more")
    return Ratio(float((a - b).mean()), *ends)


def _block_sums(values: Array) -> tuple[Array, Array]:
    """Sum and number of the values in each bootstrap block."""
    windows, positions = values.shape
    width = positions if windows >= ENOUGH_WINDOWS else min(BLOCK_POSITIONS, positions)
    starts = np.arange(0, positions, width)
    counts = np.diff(np.append(starts, positions)).astype(np.float64)
    return np.add.reduceat(values, starts, axis=1).ravel(), np.tile(counts, windows)


def _draws(blocks: int) -> npt.NDArray[np.int64]:
    """(RESAMPLES, blocks) indices, the same at every call with as many blocks."""
    return np.random.Generator(np.random.PCG64(0)).integers(0, blocks, (RESAMPLES, blocks))


# ---- eval_report.json


def report_to_json(scored: EvalReport) -> Json:
    """The report as it stands in eval_report.json: the dataclass's fields under their own names."""
    plain = dataclasses.asdict(scored)
    return {name: list(v) if isinstance(v, tuple) else v for name, v in plain.items()}


def report_from_json(data: Json) -> EvalReport:
    """Inverse of report_to_json; unknown keys are passed over. Missing or wrong ones raise BadCheckpoint."""
    cure = "run quantmill eval again"
    missing = [
        f.name
        for f in dataclasses.fields(EvalReport)
        if f.default is dataclasses.MISSING and f.name not in data
    ]
    if missing:
        raise BadCheckpoint(f"eval_report.json lacks {', '.join(missing)}: {cure}")
    values = {f.name: data[f.name] for f in dataclasses.fields(EvalReport) if f.name in data}
    wrong = [name for name, value in values.items() if not _fits(name, value)]
    if wrong:
        raise BadCheckpoint(f"eval_report.json holds something unexpected in {', '.join(wrong)}: {cure}")
    fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    return EvalReport(**fields)


REQUIRED_TYPES: dict[str, type | tuple[type, ...]] = {
    "perplexity": (int, float),
    "tokens": int,
    "windows": int,
    "ctx": int,
    "text": str,
    "text_sha256": str,
    "protocol": str,
}


def _fits(name: str, value: object) -> bool:
    """Whether a JSON value can stand in a field: what is not required is a number, or null."""
    if name in REQUIRED_TYPES:
        return isinstance(value, REQUIRED_TYPES[name])
    if name.endswith("_ci") and isinstance(value, list):
        return len(value) == 2 and all(isinstance(end, (int, float)) for end in value)
    return value is None or (not name.endswith("_ci") and isinstance(value, (int, float)))
