"""The plan: spec.md's table from the facts in spec.md, and predictions against what is really written."""

from __future__ import annotations

import pytest

from quantmill.errors import BadCheckpoint, UnsupportedModel
from quantmill.hub.variants import CARD_GRID
from quantmill.quantize.plan import plan, quantised_weights
from quantmill.types import QuantConfig, Variant

MISTRAL_7B = {
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def predict(config=MISTRAL_7B, variants=CARD_GRID, samples=128, seqlen=2048):
    return plan(config, variants, samples=samples, seqlen=seqlen, flops_per_second=1e11)


def test_the_table_of_the_specification() -> None:
    rows = predict()
    assert [r.branch for r in rows] == [
        "main",
        "gptq-4bit-32g-actorder_True",
        "gptq-8bit-128g-actorder_True",
        "gptq-8bit-32g-actorder_True",
    ]
    for row, gigabytes in zip(rows, (4.16, 4.57, 7.68, 8.17), strict=True):
        assert row.size_bytes / 1e9 == pytest.approx(gigabytes, rel=0.003)
    assert [round(r.bits_per_weight, 3) for r in rows] == [4.156, 4.625, 8.188, 8.75]
    assert quantised_weights(MISTRAL_7B) == 6_979_321_856


def test_no_more_is_written_than_was_planned() -> None:
    """`--target-size` is a limit: SmolLM2-135M's folder of 4 bits, group 64, holds 114 620 744 bytes of weights."""
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    small = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **sizes, **heads}
    [row] = predict(small, [Variant("x", QuantConfig(bits=4, group_size=64))])
    assert 114_620_744 <= row.size_bytes < 1.001 * 114_620_744


def test_more_tokens_cost_more() -> None:
    few, many = predict(samples=32)[0], predict(samples=128)[0]
    assert many.peak_ram_bytes > few.peak_ram_bytes
    assert many.seconds > 2 * few.seconds
    assert many.size_bytes == few.size_bytes


def test_the_last_group_may_be_short() -> None:
    config = MISTRAL_7B | {
        "hidden_size": 576,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
    }
    row = predict(config, (Variant("x", QuantConfig(group_size=128)),))[0]
    assert row.bits_per_weight > 4 + 20 / 128


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"model_type": "gpt2"}, UnsupportedModel, "mistral, llama"),
        ({"model_type": None}, UnsupportedModel, "model_type is None"),
        ({"hidden_size": "big"}, BadCheckpoint, "hidden_size"),
        ({"num_hidden_layers": 0}, BadCheckpoint, "num_hidden_layers"),
        ({"vocab_size": None}, BadCheckpoint, "vocab_size"),
        ({"mlp_bias": True}, UnsupportedModel, "bias"),
    ],
)
def test_a_config_that_cannot_be_read_is_refused_by_name(change, error, words) -> None:
    with pytest.raises(error, match=words):
        predict(MISTRAL_7B | change)
