"""The slow runtime against Transformers itself, for families and formats that the fast ones do not know."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantmill.errors import BadRequest
from quantmill.runtime.interface import PAGE, Piece
from quantmill.runtime.reference import ReferenceRuntime
from quantmill.runtime.single import SingleSequence
from tiny_models import tiny_model

TOKENS = np.random.default_rng(0).integers(2, 320, 150).tolist()
CASES = {
    "llama": {},
    "mistral": {"sliding_window": 24},
    "phi3": {"sliding_window": 40},
    "qwen2": {"use_sliding_window": True, "sliding_window": 30, "max_window_layers": 1},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},
}


def wanted(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0].numpy()


def near(found, expected) -> bool:
    return bool(np.abs(found - expected).max() < 1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", CASES)
def test_pieces_give_what_the_whole_text_gives(name: str) -> None:
    model = tiny_model(name, **CASES[name])
    expected = wanted(model)
    runtime = ReferenceRuntime(model, kv_tokens=1024)
    first, second = [3, 1, 7], [2, 5, 0]
    runtime.forward([Piece(TOKENS[:70], 0, first), Piece(TOKENS[:64], 0, second)])
    found = runtime.forward(
        [
            Piece(TOKENS[70:140], 70, first, every=True),
            Piece(TOKENS[64:65], 64, second),
            Piece(TOKENS[:1], 0, [4]),
        ]
    )
    assert found.dtype == np.float32
    assert near(found[:70], expected[70:140])
    assert near(found[70:], expected[[64, 0]])


def test_other_sequences_change_no_bit() -> None:
    runtime = ReferenceRuntime(tiny_model("llama"), kv_tokens=1024)
    alone = runtime.forward([Piece(TOKENS[:9], 0, [0])]).copy()
    both = runtime.forward([Piece(TOKENS[:30], 0, [1], every=True), Piece(TOKENS[:9], 0, [0])])
    assert np.array_equal(both[-1], alone[0])


def test_one_sequence_and_hidden_states() -> None:
    model = tiny_model("llama")
    runtime = ReferenceRuntime(model, kv_tokens=512)
    expected = wanted(model)
    assert near(SingleSequence(runtime).score(TOKENS), expected)
    hidden = runtime.hidden([Piece(TOKENS[:70], 0, [0, 1])])
    assert near(hidden @ model.lm_head.weight.detach().numpy().T, expected[:70])


def test_facts() -> None:
    facts = ReferenceRuntime(tiny_model("llama"), kv_tokens=100, ends=(1,)).facts
    assert (facts.pages, facts.context, facts.vocab_size, facts.window) == (2, 128, 320, None)
    assert facts.bytes_per_page == PAGE * 2 * 2 * 2 * 16 * 4
    assert facts.eos_token_ids == (1,)
    assert facts.bytes_per_token > 0


def test_what_cannot_be_read_is_refused() -> None:
    runtime = ReferenceRuntime(tiny_model("llama"), kv_tokens=128)
    for pieces, said in (
        ([], "at least one"),
        ([Piece([], 0, [0])], "at least one token"),
        ([Piece([320], 0, [0])], "0 to 319"),
        ([Piece([5], 128, [0, 1, 0])], "do not fit the context of 128"),
        ([Piece([5], 64, [0])], "not held"),
        ([Piece([5], 0, [2])], "not held"),
        ([Piece([5], 0, [0])] * 65, "a pass takes"),
    ):
        with pytest.raises(BadRequest, match=said):
            runtime.forward(pieces)
    with pytest.raises(BadRequest, match="1 to 256"):
        ReferenceRuntime(tiny_model("llama"), context=257)
