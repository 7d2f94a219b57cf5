"""The compiled decoder against Transformers with the same, dequantised weights: families, windows, orders."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gptq_folders import quantize_folder
from numpy.typing import NDArray

from quantmill.checkpoint import save_tensors, write_json
from quantmill.errors import BadRequest, UnsupportedModel
from quantmill.kernels.cpu.isa import available
from quantmill.kernels.cpu.layout import Precision
from quantmill.runtime.cpu.decoder import AT_ONCE, CpuDecoder
from quantmill.types import ActOrder, QuantConfig
from tiny_models import tiny_model

LENGTH = 2 * AT_ONCE + 44  # more than two blocks, and more than the ring of the windowed model


@dataclass(frozen=True, slots=True)
class Case:
    """A model family, what its configuration adds, and how it is quantised."""

    family: str
    config: QuantConfig
    settings: dict[str, Any] = field(default_factory=dict)


PLAIN = QuantConfig(bits=4, group_size=32, act_order=ActOrder.NONE)
CASES = {
    "llama": Case("llama", PLAIN, {"tie_word_embeddings": True}),
    "mistral-window": Case("mistral", PLAIN, {"sliding_window": 24}),
    "qwen2-bias-8bit": Case("qwen2", QuantConfig(bits=8, group_size=16, act_order=ActOrder.NONE)),
    "qwen3-grouped-asym": Case(
        "qwen3", QuantConfig(bits=4, group_size=32, sym=False, act_order=ActOrder.GROUPED), {"head_dim": 32}
    ),
    "llama-3bit": Case(
        "llama", QuantConfig(bits=3, group_size=-1, sym=False, act_order=ActOrder.NONE), {"head_dim": 64}
    ),
    "llama3-rope": Case(
        "llama",
        PLAIN,
        {
            "num_key_value_heads": 4,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
}


@dataclass(frozen=True, slots=True)
class Made:
    """A folder, tokens, and what Transformers says to them in float32."""

    folder: Path
    tokens: list[int]
    logits: NDArray[np.float32]  # (LENGTH, vocab)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    cases = {}
    for name, case in CASES.items():
        model = tiny_model(case.family, max_position_embeddings=1024, **case.settings)
        folder = tmp_path_factory.mktemp(name)
        quantize_folder(model, folder, case.config)
        tokens = np.random.default_rng(3).integers(2, 320, LENGTH).tolist()
        with torch.no_grad():
            logits = model(torch.tensor([tokens]), attention_mask=None).logits[0]
        cases[name] = Made(folder, tokens, logits.float().numpy())
    return cases


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("QUANTMILL_HOME", str(tmp_path_factory.getbasetemp() / "home"))


def mean_kl(wanted: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    p, q = (torch.from_numpy(x).double().log_softmax(-1) for x in (wanted, found))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("name", CASES)
def test_exact_decoder_is_transformers(made: dict[str, Made], name: str) -> None:
    case = made[name]
    decoder = CpuDecoder.from_folder(case.folder, threads=2, exact=True)
    found = decoder.score(case.tokens)
    assert found.shape == case.logits.shape
    assert np.abs(found - case.logits).max() < 2e-4 * np.abs(case.logits).max()


@pytest.mark.parametrize("name", CASES)
def test_integer_activations_cost_little(made: dict[str, Made], name: str) -> None:
    case = made[name]
    for precision, loss in ((Precision.INT16, 1e-5), (Precision.INT8, 2e-2)):
        decoder = CpuDecoder.from_folder(case.folder, threads=2, precision=precision)
        assert 0 <= mean_kl(case.logits, decoder.score(case.tokens)) < loss


@pytest.mark.parametrize("name", ["mistral-window", "qwen3-grouped-asym"])
def test_steps_go_on_where_a_prompt_ended(made: dict[str, Made], name: str) -> None:
    case = made[name]
    decoder = CpuDecoder.from_folder(case.folder, threads=2, exact=True)
    first = decoder.prefill(case.tokens[:190])
    steps = [decoder.step(token) for token in case.tokens[190:]]
    assert decoder.position == LENGTH
    found = np.array([first, *steps[:-1]])
    wanted = case.logits[189:-1]
    assert np.abs(found - wanted).max() < 2e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("isa", [row.name for row in available()])
def test_every_instruction_set_runs_the_model(made: dict[str, Made], isa: str) -> None:
    case = made["llama"]
    decoder = CpuDecoder.from_folder(case.folder, threads=1, isa=isa)
    assert mean_kl(case.logits[:40], decoder.score(case.tokens[:40])) < 1e-5
    assert np.isfinite(decoder.step(5)).all()


def test_threads_change_no_bit(made: dict[str, Made]) -> None:
    case = made["mistral-window"]
    one, three = (CpuDecoder.from_folder(case.folder, threads=t) for t in (1, 3))
    assert np.array_equal(one.score(case.tokens), three.score(case.tokens))
    assert np.array_equal(one.step(7), three.step(7))


def test_a_reset_decoder_starts_anew_and_can_go_back(made: dict[str, Made]) -> None:
    case = made["llama"]
    decoder = CpuDecoder.from_folder(case.folder, threads=1)
    first = decoder.prefill(case.tokens[:20])
    after = decoder.step(9)
    decoder.reset(20)
    assert np.array_equal(decoder.step(9), after)
    decoder.reset()
    assert np.array_equal(decoder.prefill(case.tokens[:20]), first)
    with pytest.raises(BadRequest, match="token 21 of 20"):
        decoder.reset(21)


def test_a_window_that_has_gone_round_cannot_go_back(made: dict[str, Made]) -> None:
    case = made["mistral-window"]
    decoder = CpuDecoder.from_folder(case.folder, threads=1)
    decoder.prefill(case.tokens)
    with pytest.raises(BadRequest, match="reset to 0"):
        decoder.reset(LENGTH - 1)
    decoder.reset()
    assert decoder.position == 0


def test_what_cannot_be_read_is_refused(made: dict[str, Made]) -> None:
    decoder = CpuDecoder.from_folder(made["llama"].folder, threads=1, context=64)
    for tokens in ([], [320], [-1]):
        with pytest.raises(BadRequest, match="0 to 319"):
            decoder.prefill(tokens)
    decoder.prefill([5] * 60)
    with pytest.raises(BadRequest, match="65 tokens do not fit the context of 64"):
        decoder.prefill([5] * 5)
    with pytest.raises(BadRequest, match="8 or 16"):
        CpuDecoder.from_folder(made["llama"].folder, head_bits=4)


def test_a_model_the_step_does_not_do_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama", hidden_act="gelu")
    quantize_folder(model, tmp_path / "model", PLAIN)
    with pytest.raises(UnsupportedModel, match="silu"):
        CpuDecoder.from_folder(tmp_path / "model")


def test_a_bfloat16_model_that_is_not_quantised_runs(tmp_path: Path) -> None:
    model = tiny_model("llama").bfloat16()
    save_tensors(tmp_path, ((n, p.data) for n, p in model.named_parameters()))
    write_json(tmp_path / "config.json", model.config.to_dict())
    tokens = [5, 6, 7, 8, 9, 10]
    with torch.no_grad():
        wanted = model.float()(torch.tensor([tokens])).logits[0].numpy()
    found = CpuDecoder.from_folder(tmp_path, threads=1, exact=True).score(tokens)
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()
