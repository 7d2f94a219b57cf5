"""Text that a model writes: seeded, sampled from its own distribution, cut at its end token."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantmill.quantize import self_text


@pytest.fixture(autouse=True)
def short_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_text, "ROW_TOKENS", 6)
    monkeypatch.setattr(self_text, "BATCH", 4)


@pytest.fixture
def tokenizer(tiny_llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture
def model(tiny_llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)


def test_seeded_and_apart_from_the_global_generator(model: Any, tokenizer: Any) -> None:
    state = torch.get_rng_state()
    first = self_text.write(model, tokenizer, tokens=300, seed=5)
    torch.rand(3)
    assert self_text.write(model, tokenizer, tokens=300, seed=5) == first
    assert self_text.write(model, tokenizer, tokens=300, seed=6) != first
    torch.set_rng_state(state)
    self_text.write(model, tokenizer, tokens=10, seed=5)
    assert torch.equal(torch.get_rng_state(), state)


def test_rows_begin_with_a_start_token_or_a_chat_prompt(model: Any, tokenizer: Any) -> None:
    rows = self_text.write(model, tokenizer, tokens=300, seed=0)
    assert sum(map(len, rows)) >= 300
    alone = [row for row in rows if row[0] == tokenizer.bos_token_id]
    asked = [tokenizer.decode(row) for row in rows if row[0] != tokenizer.bos_token_id]
    assert alone
    assert all(len(row) <= 7 for row in alone)
    assert asked
    assert all(text.startswith("[user] ") and "[assistant] " in text for text in asked)


def test_padding_does_not_reach_what_is_written(model: Any, tokenizer: Any) -> None:
    """A row of a padded batch is what the same noise would have made of it alone."""
    short, long = [0], tokenizer("the old house by the river")["input_ids"]
    silent = lambda ids, scores: scores  # noqa: E731  greedy
    together = self_text._continue(model, [short, long], silent, [])
    assert together == [self_text._continue(model, [start], silent, [])[0] for start in (short, long)]


def test_works_without_start_token_and_template(model: Any, tokenizer: Any) -> None:
    tokenizer.bos_token_id = None
    tokenizer.chat_template = None
    rows = self_text.write(model, tokenizer, tokens=100, seed=0)
    texts = [tokenizer.decode(row) for row in rows]
    openings = [form.split("{}")[0] for form in self_text.FORMS]
    assert all(text.startswith(tuple(openings)) for text in texts)


def test_rows_stop_at_any_end_token_and_silence_ends_the_run(tokenizer: Any) -> None:
    """The generation config of a model may name end tokens that its tokenizer does not."""

    class Canned:
        device = "cpu"
        generation_config = SimpleNamespace(eos_token_id=[1, 9])

        def __init__(self, answer: list[int]) -> None:
            self.answer, self.calls = answer, 0

        def generate(self, ids: torch.Tensor, **options: Any) -> torch.Tensor:
            self.calls += 1
            return torch.cat([ids, torch.tensor([self.answer] * len(ids))], 1)

    rows = self_text.write(Canned([5, 9, 7]), tokenizer, tokens=1, seed=0)
    assert rows[0] == [tokenizer.bos_token_id, 5, 9]
    mute = Canned([9, 9, 9])
    assert self_text.write(mute, tokenizer, tokens=1, seed=0) == []
    assert mute.calls == 16


def test_noise_samples_the_softmax() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    noise = self_text.GumbelNoise(0)
    drawn = noise(torch.empty(0), probabilities.log().expand(40_000, 4)).argmax(-1)
    shares = torch.bincount(drawn, minlength=4) / 40_000
    assert torch.allclose(shares, probabilities, atol=0.01)


def test_rows_gone_on_from_are_as_long_begin_alike_and_are_the_models_own(model: Any) -> None:
    rows = torch.randint(2, 300, (3, 21))
    state = torch.get_rng_state()
    more = self_text.go_on(model, rows, 2, seed=1, at_once=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert more.shape == (6, 21)
    assert torch.equal(more[:3, :5], rows[:, :5])  # eleven tokens a piece, five of them given
    assert torch.equal(more, self_text.go_on(model, rows, 2, seed=1, at_once=5))
    assert not torch.equal(more, self_text.go_on(model, rows, 2, seed=2, at_once=5))


def test_what_is_gone_on_with_is_drawn_from_the_models_own_distribution(model: Any) -> None:
    rows = torch.randint(2, 300, (1, 4)).expand(400, -1)
    first = self_text.go_on(model, rows, 1, seed=3)[:, 1]
    with torch.inference_mode():
        wanted = model(rows[:1, :1]).logits[0, -1].float().softmax(-1)
    found = torch.bincount(first, minlength=len(wanted)).float() / len(first)
    likely = wanted.topk(20).indices
    assert (found[likely].sum() - wanted[likely].sum()).abs() < 4 * (wanted[likely].sum() / 400).sqrt()
