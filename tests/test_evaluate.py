"""Scores against a brute-force computation, intervals against a known truth, and every refusal."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from quantmill import evaluate as ev
from quantmill.errors import BadCheckpoint, BadRequest, BadText
from quantmill.types import EvalReport

IDS = torch.tensor([0, 1, 2, 2, 1, 0, 1, 1, 2, 0, 0, 2, 1, 0])


class Table:
    """A model whose logits depend on the last token only: row t of `logits` (V, V) follows token t."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits
        self.calls = 0

    def __call__(self, input_ids: torch.Tensor) -> SimpleNamespace:
        self.calls += 1
        return SimpleNamespace(logits=self.logits[input_ids])


def table(seed: int, vocabulary: int = 3, dtype: torch.dtype = torch.float32) -> Table:
    generator = torch.Generator().manual_seed(seed)
    return Table((2 * torch.randn(vocabulary, vocabulary, generator=generator)).to(dtype))


def brute_force(model: Table, original: Table, ids: torch.Tensor, ctx: int, windows: int) -> dict[str, float]:
    """The same numbers in float64, one position at a time, by the definitions."""
    q_rows, p_rows = (m.logits.double().numpy() for m in (model, original))
    nll, original_nll, kl, same, delta = [], [], [], [], []
    for w in range(windows):
        for t in range(w * ctx, (w + 1) * ctx - 1):
            now, following = int(ids[t]), int(ids[t + 1])
            q, p = (np.exp(rows[now]) / np.exp(rows[now]).sum() for rows in (q_rows, p_rows))
            nll.append(-math.log(q[following]))
            original_nll.append(-math.log(p[following]))
            kl.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
            same.append(p.argmax() == q.argmax())
            delta.append(q[following] - p[following])
    return {
        "perplexity": math.exp(np.mean(nll)),
        "original_perplexity": math.exp(np.mean(original_nll)),
        "mean_kl": float(np.mean(kl)),
        "median_kl": float(np.quantile(kl, 0.5)),
        "p99_kl": float(np.quantile(kl, 0.99)),
        "p999_kl": float(np.quantile(kl, 0.999)),
        "max_kl": max(kl),
        "top1_agreement": float(np.mean(same)),
        "rms_delta_p": math.sqrt(np.mean(np.square(delta))),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_agrees_with_brute_force_in_float64(dtype: torch.dtype) -> None:
    model, original = table(1, dtype=dtype), table(2, dtype=dtype)
    found = ev.evaluate({"q": model}, IDS, original=original, ctx=4, windows=3)["q"]
    for key, value in brute_force(model, original, IDS, 4, 3).items():
        assert getattr(found, key) == pytest.approx(value, rel=1e-5), key
    assert (found.tokens, found.windows, found.ctx) == (9, 3, 4)


def test_a_model_has_no_distance_to_itself() -> None:
    model = table(3)
    found = ev.evaluate({"same": model}, IDS, original=model, ctx=5, windows=None)["same"]
    assert found.mean_kl == found.max_kl == found.rms_delta_p == 0
    assert found.mean_kl_ci is not None
    assert found.top1_agreement == 1
    assert found.perplexity == found.original_perplexity


def test_without_an_original_only_perplexity_is_reported() -> None:
    found = ev.evaluate({"q": table(1)}, IDS, ctx=7, windows=2, text="made up", text_sha256="ab")["q"]
    assert found.perplexity > 1
    assert found.mean_kl is found.mean_kl_ci is found.top1_agreement is None
    assert (found.text, found.text_sha256) == ("made up", "ab")
    assert "2 non-overlapping windows of 7 tokens" in found.protocol


def test_original_runs_once_per_window_and_progress_counts_passes() -> None:
    original, models = table(0), {"a": table(1), "b": table(2)}
    told: list[tuple[int, int]] = []
    found = ev.evaluate(
        models, IDS, original=original, ctx=4, windows=3, progress=lambda done, of: told.append((done, of))
    )
    assert list(found) == ["a", "b"]
    assert original.calls == models["a"].calls == 3
    assert told == [(n, 9) for n in range(1, 10)]


@pytest.mark.parametrize("chunk_bytes", [1, 5 * 32 * 17, 1 << 30])
def test_chunks_do_not_change_results(chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(0, 17, (100,), generator=torch.Generator().manual_seed(0))
    whole = ev.evaluate({"q": table(1, 17)}, ids, original=table(2, 17), ctx=33)
    monkeypatch.setattr(ev, "CHUNK_BYTES", chunk_bytes)
    assert ev.evaluate({"q": table(1, 17)}, ids, original=table(2, 17), ctx=33) == whole


def test_windows_are_the_first_of_the_text_and_never_overlap() -> None:
    assert ev.token_windows(IDS, ctx=4, windows=2).tolist() == [[0, 1, 2, 2], [1, 0, 1, 1]]
    assert len(ev.token_windows(IDS, ctx=4, windows=99)) == 3
    assert len(ev.token_windows(IDS, ctx=4, windows=None)) == 3
    assert ev.token_windows(IDS.to(torch.int32), ctx=14, windows=1).dtype == torch.int64


@pytest.mark.parametrize(
    ("ids", "ctx", "windows", "error", "message"),
    [
        (IDS, 1, 6, BadRequest, "--ctx 1024"),
        (IDS, 4, 0, BadRequest, "--windows 6"),
        (IDS[:1], 4, 6, BadText, "holds 1 tokens"),
        (IDS[:0], 4, 6, BadText, "longer"),
        (IDS, 15, 6, BadText, "less than one window of 15: use --ctx 8"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    ids: torch.Tensor, ctx: int, windows: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ev.evaluate({"q": table(1)}, ids, ctx=ctx, windows=windows)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_logits_name_the_model_and_the_window(bad: float) -> None:
    ids = torch.tensor([0, 1, 1, 0, 1, 2])  # token 2 comes in the second window only
    broken = table(1)
    broken.logits[2, 1] = bad
    with pytest.raises(BadCheckpoint, match="4bit gives NaN or infinite logits in window 2"):
        ev.evaluate({"4bit": broken}, ids, original=table(2), ctx=3)
    with pytest.raises(BadCheckpoint, match="the original gives NaN"):
        ev.evaluate({"4bit": table(2)}, ids, original=broken, ctx=3)


def test_vocabularies_must_agree() -> None:
    with pytest.raises(BadCheckpoint, match="vocabulary of 3 tokens, the original 4"):
        ev.evaluate({"q": table(1)}, IDS, original=table(1, 4), ctx=4)


@pytest.mark.parametrize("shape", [(20, 50), (4, 640)])  # blocks are windows; blocks are 64 positions
def test_interval_of_a_mean_covers_the_truth(shape: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    hits, widths = 0, []
    for _ in range(100):
        interval = ev.mean_interval(random.exponential(2.0, shape))
        assert interval is not None
        hits += interval[0] <= 2.0 <= interval[1]
        widths.append(interval[1] - interval[0])
    assert 85 <= hits <= 100
    assert np.mean(widths) == pytest.approx(2 * 1.96 * 2.0 / math.sqrt(shape[0] * shape[1]), rel=0.15)


def test_interval_weighs_short_blocks_by_their_length() -> None:
    values = np.ones((2, 70))
    assert ev.mean_interval(values) == (1.0, 1.0)


def test_one_block_has_no_interval() -> None:
    assert ev.mean_interval(np.ones((1, 60))) is None


def test_paired_ratio_is_tighter_than_its_parts() -> None:
    random = np.random.default_rng(1)
    hard = random.exponential(1.0, (16, 1)) * np.ones((16, 100))  # some windows are harder for both
    noise = random.uniform(0.95, 1.05, hard.shape)
    ratio = ev.paired_ratio(0.7 * hard * noise, hard)
    assert ratio.low <= ratio.value <= ratio.high
    assert ratio.value == pytest.approx(0.7, rel=0.01)
    assert ratio.high - ratio.low < 0.02
    assert ev.paired_ratio(hard, hard) == ev.Ratio(1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.ones((2, 70)), np.ones((3, 70)), "cannot be paired"),
        (np.ones((2, 70)), np.zeros((2, 70)), "too little text"),
        (np.ones((1, 60)), np.ones((1, 60)), "too little text"),
    ],
)
def test_ratios_that_mean_nothing_are_refused(a: ev.Array, b: ev.Array, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        ev.paired_ratio(a, b)


def test_scores_of_two_variants_can_be_paired() -> None:
    ids = torch.randint(0, 9, (400,), generator=torch.Generator().manual_seed(0))
    cut = ev.token_windows(ids, ctx=40, windows=None)
    near, far = table(0, 9), table(0, 9)
    near.logits = near.logits + 0.1 * table(1, 9).logits
    far.logits = far.logits + 0.3 * table(1, 9).logits
    scores = ev.score({"near": near, "far": far}, cut, original=table(0, 9))
    assert scores["near"].distance is not None
    assert scores["far"].distance is not None
    assert scores["near"].distance.kl.shape == (10, 39)
    assert ev.paired_ratio(scores["near"].distance.kl, scores["far"].distance.kl).high < 0.3


def test_report_survives_json() -> None:
    with_original = ev.evaluate({"q": table(1)}, IDS, original=table(2), ctx=7)["q"]
    alone = ev.evaluate({"q": table(1)}, IDS, ctx=7)["q"]
    many = torch.randint(0, 3, (280,), generator=torch.Generator().manual_seed(0))
    long = ev.evaluate({"q": table(1)}, many, original=table(2), ctx=7, windows=None)["q"]
    assert long.mean_kl_ci is not None
    assert long.mean_kl is not None
    assert long.mean_kl_ci[0] < long.mean_kl < long.mean_kl_ci[1]
    for report in (with_original, alone, long):
        data = json.loads(json.dumps(ev.report_to_json(report)))
        assert {"perplexity", "mean_kl", "mean_kl_ci", "top1_agreement", "tokens"} <= set(data)
        assert ev.report_from_json(data | {"from": "a newer version"}) == report


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"perplexity": None}, "unexpected in perplexity"),
        ({"mean_kl": "low"}, "unexpected in mean_kl"),
        ({"mean_kl_ci": [1.0]}, "unexpected in mean_kl_ci"),
        ({"mean_kl_ci": 3.0}, "unexpected in mean_kl_ci"),
        ({"text": 3, "ctx": "x"}, "unexpected in ctx, text"),
    ],
)
def test_damaged_reports_are_refused(change: dict[str, object], message: str) -> None:
    good = ev.report_to_json(EvalReport(9.0, 10, 1, 11, "t", "", "p"))
    with pytest.raises(BadCheckpoint, match=message):
        ev.report_from_json(good | change)
    with pytest.raises(BadCheckpoint, match=r"lacks perplexity: run quantmill eval again"):
        ev.report_from_json({key: value for key, value in good.items() if key != "perplexity"})


def test_a_comparison_is_paired() -> None:
    models, original = {"a": table(1), "b": table(4)}, table(2)
    ids = torch.randint(0, 3, (40 * 12,), generator=torch.Generator().manual_seed(0))
    scores = ev.score(models, ev.token_windows(ids, ctx=12, windows=None), original=original)
    found = ev.compare(scores["a"], scores["b"])
    a, b = (ev.report(scores[name]) for name in "ab")
    assert found.perplexity_ratio.value == pytest.approx(a.perplexity / b.perplexity)
    assert found.kl_ratio is not None
    assert found.top1_difference is not None
    assert found.kl_ratio.value == pytest.approx(a.mean_kl / b.mean_kl)
    assert found.top1_difference.value == pytest.approx(a.top1_agreement - b.top1_agreement)
    for ends in (found.perplexity_ratio, found.kl_ratio, found.top1_difference):
        assert ends.low < ends.value < ends.high
    same = ev.compare(scores["a"], scores["a"])
    assert same.kl_ratio == ev.Ratio(1.0, 1.0, 1.0)
    assert same.top1_difference == ev.Ratio(0.0, 0.0, 0.0)


def test_without_an_original_only_perplexities_are_compared() -> None:
    scores = ev.score({"a": table(1), "b": table(4)}, ev.token_windows(IDS, ctx=4, windows=None))
    found = ev.compare(scores["a"], scores["b"])
    assert found.kl_ratio is None
    assert found.top1_difference is None


def test_ratio_and_change_of_probability_are_those_of_the_definition() -> None:
    model, original = table(1), table(2)
    found = ev.evaluate({"q": model}, IDS, original=original, ctx=4, windows=3)["q"]
    known = brute_force(model, original, IDS, 4, 3)
    assert found.perplexity_ratio == pytest.approx(known["perplexity"] / known["original_perplexity"])
    assert found.mean_delta_p is not None
    assert abs(found.mean_delta_p) <= found.rms_delta_p
    for name in ("perplexity_ratio", "top1_agreement", "rms_delta_p"):
        low, high = getattr(found, f"{name}_ci")
        assert low <= getattr(found, name) <= high
    assert ev.report_from_json(ev.report_to_json(found)) == found
