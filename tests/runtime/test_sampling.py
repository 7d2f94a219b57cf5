"""The sampler against plain statements of what each parameter means, and its two twins against each other."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from quantmill.errors import BadRequest, QuantmillError
from quantmill.runtime import sampling_torch
from quantmill.runtime.sampling import (
    SamplerState,
    _kth_largest,
    _walk,
    check_tokens,
    picked_rows,
    sample,
    sample_rows,
    score,
)
from quantmill.types import SamplingParams

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]
PLAIN = SamplingParams(temperature=1, top_p=1, top_k=0, repetition_penalty=1, seed=1)
LOGITS = np.log(np.array([0.4, 0.3, 0.15, 0.1, 0.05], np.float32))


def drawn(params: SamplingParams, logits: np.ndarray = LOGITS, draws: int = 400, **kwargs) -> np.ndarray:
    """How often each token comes, over many seeds."""
    counts = np.zeros(len(logits), int)
    for seed in range(draws):
        state = SamplerState(dataclasses.replace(params, seed=seed), **kwargs)
        counts[sample(logits, state).token] += 1
    return counts


def test_without_filters_tokens_come_as_often_as_the_model_says() -> None:
    shares = drawn(PLAIN, draws=4000) / 4000
    assert np.abs(shares - np.exp(LOGITS)).max() < 0.03


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 5}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.6}, {0, 1}),
        ({"top_p": 0.39}, {0}),
        ({"top_p": 0.71}, {0, 1, 2}),
        ({"top_k": 3, "top_p": 0.8}, {0, 1}),  # of what the first filter has left: 0.85 in all
        ({"min_p": 0.3}, {0, 1, 2}),
        ({"min_p": 1.0}, {0}),
        ({"typical_p": 0.25}, {1}),  # the entropy is 1.39, its surprise 1.20
        ({"typical_p": 0.6}, {0, 1}),
        ({"temperature": 0}, {0}),
        ({"temperature": 0.01}, {0}),
    ],
)
def test_filters_keep_what_they_say(change: dict[str, float], kept: set[int]) -> None:
    counts = drawn(dataclasses.replace(PLAIN, **change))
    assert set(np.flatnonzero(counts)) == kept


@pytest.mark.parametrize("vocab", [2047, 2048, 5003])
@pytest.mark.parametrize("k", [1, 40, 512, 513, 2000])
def test_the_kth_largest_of_many(vocab: int, k: int) -> None:
    for seed in range(5):
        values = np.random.default_rng(seed).normal(0, 1, vocab).astype(np.float16).astype(np.float32)
        assert _kth_largest(values, k) == np.sort(values)[-k]


@pytest.mark.parametrize("size", [1, 63, 64, 65, 1000])
def test_walking_weights_finds_the_place(size: int) -> None:
    rng = np.random.default_rng(size)
    weights = (rng.random(size) * (rng.random(size) < 0.5)).astype(np.float32)
    weights[rng.integers(size)] = 1.0
    whole = weights.cumsum(dtype=np.float64)
    for uniform in (0.0, 0.2, 0.7, 1 - 2**-53):
        place = _walk(weights, uniform)
        assert weights[place] > 0
        assert whole[place] >= uniform * whole[-1] - 1e-5
        assert place == 0 or whole[place] - weights[place] <= uniform * whole[-1] + 1e-5


def test_ties_are_kept_whole() -> None:
    logits = np.zeros(6, np.float32)
    for change in ({"top_k": 2}, {"top_p": 0.2}, {"typical_p": 0.2}, {"min_p": 1.0}):
        assert np.count_nonzero(drawn(dataclasses.replace(PLAIN, **change), logits)) == 6


def test_temperature_sharpens() -> None:
    cold = drawn(dataclasses.replace(PLAIN, temperature=0.5), draws=2000)[0] / 2000
    assert cold == pytest.approx(0.16 / (np.exp(LOGITS) ** 2).sum(), abs=0.04)


def test_repetition_penalty_sees_prompt_and_answer() -> None:
    params = dataclasses.replace(PLAIN, temperature=0, repetition_penalty=2.0)
    logits = np.array([2.0, 1.5, 1.2, -1.0], np.float32)
    state = SamplerState(params, [0])
    assert [sample(logits, state).token for _ in range(3)] == [1, 2, 0]
    negative = SamplerState(params, [0])
    assert sample(np.array([-1.0, -1.5], np.float32), negative).token == 1  # -2 after the penalty


def test_presence_counts_once_frequency_every_time_and_neither_the_prompt() -> None:
    logits = np.array([1.0, 0.0], np.float32)
    presence = SamplerState(dataclasses.replace(PLAIN, temperature=0, presence_penalty=0.6), [0])
    assert [sample(logits, presence).token for _ in range(3)] == [0, 0, 0]
    frequency = SamplerState(dataclasses.replace(PLAIN, temperature=0, frequency_penalty=0.6), [0])
    assert [sample(logits, frequency).token for _ in range(4)] == [0, 0, 1, 0]


def test_bias_and_mask() -> None:
    banned = SamplerState(dataclasses.replace(PLAIN, temperature=0, logit_bias={0: -100, 3: 50}))
    assert sample(LOGITS, banned).token == 3
    mask = np.array([False, False, True, False, True])
    assert sample(LOGITS, SamplerState(dataclasses.replace(PLAIN, temperature=0)), mask=mask).token == 2
    masks = [SamplerState(dataclasses.replace(PLAIN, seed=s)) for s in range(50)]
    assert {sample(LOGITS, s, mask=mask).token for s in masks} == {2, 4}


def test_many_seen_tokens_fit() -> None:
    state = SamplerState(dataclasses.replace(PLAIN, temperature=0, repetition_penalty=1.5), range(300))
    logits = np.ones(400, np.float32)
    assert [sample(logits, state).token for _ in range(100)] == list(range(300, 400))


def test_random_numbers_depend_on_seed_choice_and_position_only() -> None:
    def line(seed: int, choice: int = 0) -> list[float]:
        state, out = SamplerState(dataclasses.replace(PLAIN, seed=seed), choice=choice), []
        for _ in range(5):
            out.append(state.uniform())
            state.accept(0)
        return out

    assert line(7) == line(7)
    lines = [line(s, c) for s, c in itertools.product((0, 1, -1, 2**63), (0, 1))]
    assert len({x for numbers in lines for x in numbers}) == 40
    assert all(0 <= x < 1 for numbers in lines for x in numbers)
    many = np.array([SamplerState(dataclasses.replace(PLAIN, seed=s)).uniform() for s in range(4000)])
    assert abs(many.mean() - 0.5) < 0.02
    assert np.abs(np.histogram(many, 10, (0, 1))[0] - 400).max() < 90


def test_without_a_seed_every_answer_has_its_own() -> None:
    params = dataclasses.replace(PLAIN, seed=None)
    assert SamplerState(params).seed != SamplerState(params).seed


def test_log_probabilities_are_the_models_own() -> None:
    params = dataclasses.replace(PLAIN, temperature=0, logprobs=2, logit_bias={4: 100.0})
    got = sample(LOGITS, SamplerState(params))
    assert got.token == 4
    assert got.logprob == pytest.approx(math.log(0.05), abs=1e-5)
    assert [t for t, _ in got.top] == [0, 1]
    assert [p for _, p in got.top] == pytest.approx([math.log(0.4), math.log(0.3)], abs=1e-5)
    assert sample(LOGITS, SamplerState(PLAIN)).logprob is None
    assert sample(LOGITS, SamplerState(dataclasses.replace(PLAIN, best_of=2))).logprob is not None
    assert score(LOGITS, 2, 9).logprob == pytest.approx(math.log(0.15), abs=1e-5)
    assert len(score(LOGITS, 2, 9).top) == 5


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_logits_without_a_number_are_an_error(kind: str, bad: float) -> None:
    row = np.full((1, 4), bad, np.float32)
    logits = row if kind == "numpy" else torch.from_numpy(row)
    with pytest.raises(QuantmillError, match="no finite logit"):
        sample_rows(logits, [SamplerState(PLAIN)])


def test_tokens_outside_the_vocabulary_are_refused() -> None:
    check_tokens(dataclasses.replace(PLAIN, logit_bias={9: 1.0}, stop_token_ids=(3,)), 10)
    with pytest.raises(BadRequest, match="logit_bias names token 10"):
        check_tokens(dataclasses.replace(PLAIN, logit_bias={10: 1.0}), 10)
    with pytest.raises(BadRequest, match="stop_token_ids names token -1"):
        check_tokens(dataclasses.replace(PLAIN, stop_token_ids=(-1,)), 10)


def variety(rng: np.random.Generator) -> SamplingParams:
    """Parameters of every kind, each off in about half of the cases."""

    def some(value: float, off: float) -> float:
        return value if rng.random() < 0.5 else off

    return SamplingParams(
        temperature=some(float(rng.uniform(0.3, 1.5)), float(rng.integers(0, 2))),
        top_k=int(some(int(rng.integers(1, 60)), 0)),
        top_p=some(float(rng.uniform(0.2, 0.99)), 1.0),
        min_p=some(float(rng.uniform(0.0, 0.2)), 0.0),
        typical_p=some(float(rng.uniform(0.3, 0.95)), 1.0),
        repetition_penalty=some(1.3, 1.0),
        presence_penalty=some(0.5, 0.0),
        frequency_penalty=some(0.3, 0.0),
        logit_bias={} if rng.random() < 0.5 else {3: 4.0, 17: -100.0},
        logprobs=None if rng.random() < 0.5 else int(rng.integers(0, 6)),
        seed=int(rng.integers(0, 1 << 40)),
    )


@pytest.mark.parametrize("vocab", [50, 1000, 5003])
@pytest.mark.parametrize("rows", [1, 7, 40])
@pytest.mark.parametrize("device", DEVICES)
def test_the_twins_draw_the_same(rows: int, vocab: int, device: str) -> None:
    rng = np.random.default_rng(rows * vocab)
    params = [variety(rng) for _ in range(rows)]
    prompts = [rng.integers(0, vocab, 20).tolist() for _ in range(rows)]
    ours, theirs = ([SamplerState(p, ids) for p, ids in zip(params, prompts, strict=True)] for _ in range(2))
    masks = [rng.random(vocab) < 0.7 if rng.random() < 0.3 else None for _ in range(rows)]
    same = total = 0
    for _ in range(12):
        logits = rng.normal(0, 2.5, (rows, vocab)).astype(np.float32)
        kept = logits.copy()
        tensor = torch.from_numpy(logits.copy()).to(device)
        for a, b in zip(sample_rows(logits, ours, masks), sample_rows(tensor, theirs, masks), strict=True):
            same, total = same + (a.token == b.token), total + 1
            assert (a.logprob is None) == (b.logprob is None)
            assert [t for t, _ in a.top] == [t for t, _ in b.top]
            assert [p for _, p in a.top] == pytest.approx([p for _, p in b.top], abs=1e-4)
        assert np.array_equal(logits, kept)
        assert np.array_equal(tensor.cpu().numpy(), kept)
    # A draw or a cut that falls between two roundings of float32 may differ, and so may what follows it.
    assert same >= total * 0.97, f"{same} of {total}"


def test_rows_are_picked_where_they_are() -> None:
    logits = np.arange(12, dtype=np.float32).reshape(4, 3)
    there = picked_rows(torch.from_numpy(logits), [3, 1])
    assert isinstance(there, torch.Tensor)
    assert np.array_equal(there.numpy(), picked_rows(logits, [3, 1]))


def test_a_device_that_draws_otherwise_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sampling_torch, "_min_p", lambda z, params: z.flip(1))
    sampling_torch.trusted.cache_clear()
    params = SamplingParams(seed=3)
    logits = np.random.default_rng(3).normal(0, 3, (1, 500)).astype(np.float32)
    (here,) = sample_rows(logits, [SamplerState(params)])
    with caplog.at_level("WARNING"):
        (there,) = sample_rows(torch.from_numpy(logits), [SamplerState(params)])
    assert here == there
    assert "differs from the processor's" in caplog.text
    sampling_torch.trusted.cache_clear()
    monkeypatch.undo()
    assert sampling_torch.trusted(torch.device("cpu"))


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_alone_or_in_a_batch_the_same_tokens(kind: str) -> None:
    rng = np.random.default_rng(5)
    params = [variety(rng) for _ in range(16)]
    logits = rng.normal(0, 3, (10, 16, 700)).astype(np.float32)

    def run(rows: list[int]) -> list[list[int]]:
        states = [SamplerState(params[r], [1, 2, 3]) for r in rows]
        steps = [x[rows] if kind == "numpy" else torch.from_numpy(x[rows]) for x in logits]
        return [[s.token for s in sample_rows(x, states)] for x in steps]

    together = run(list(range(16)))
    for row in range(16):
        assert [step[0] for step in run([row])] == [step[row] for step in together]
