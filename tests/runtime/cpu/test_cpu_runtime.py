"""The compiled step against Transformers with the same, dequantised weights, alone and in batches."""

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
from quantmill.runtime.cpu.runtime import MAX_TOKENS, CpuRuntime
from quantmill.runtime.interface import PAGE, Piece
from quantmill.runtime.single import SingleSequence
from quantmill.types import ActOrder, QuantConfig
from tiny_models import tiny_model

LENGTH = MAX_TOKENS + 44  # more than a pass, and more than the windowed model's pages hold


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
    "qwen2-some-windows": Case(
        "qwen2", PLAIN, {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1}
    ),
    "phi3": Case("phi3", PLAIN, {"sliding_window": 50}),
    "yarn": Case(
        "llama",
        PLAIN,
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            }
        },
    ),
    "linear-rope": Case(
        "llama", PLAIN, {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}
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


def opened(folder: Path, **options: Any) -> CpuRuntime:
    return CpuRuntime.from_folder(folder, **{"threads": 2, "kv_tokens": 1024, **options})


def alone(folder: Path, **options: Any) -> SingleSequence:
    return SingleSequence(opened(folder, **options))


@pytest.mark.parametrize("name", CASES)
def test_exact_runtime_is_transformers(made: dict[str, Made], name: str) -> None:
    case = made[name]
    found = alone(case.folder, exact=True).score(case.tokens)
    assert found.shape == case.logits.shape
    assert np.abs(found - case.logits).max() < 2e-4 * np.abs(case.logits).max()


@pytest.mark.parametrize("name", CASES)
def test_integer_activations_cost_little(made: dict[str, Made], name: str) -> None:
    case = made[name]
    for precision, loss in ((Precision.INT16, 1e-5), (Precision.INT8, 2e-2)):
        found = alone(case.folder, precision=precision).score(case.tokens)
        assert 0 <= mean_kl(case.logits, found) < loss


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", ["mistral-window", "qwen3-grouped-asym", "qwen2-some-windows", "phi3"])
def test_a_row_is_the_same_alone_and_in_any_batch(made: dict[str, Made], name: str, exact: bool) -> None:
    """Token by token, as one prompt, in pieces, and among other sequences: the same bits."""
    case, size = made[name], 100
    runtime = opened(case.folder, exact=exact)
    tokens = case.tokens[:size]
    pages = [5, 2, 9, 0]  # in any order
    whole = runtime.forward([Piece(tokens, 0, pages, every=True)]).copy()
    other, single = [1, 8, 7], [3, 10]
    for i in range(70):
        assert np.array_equal(runtime.forward([Piece(tokens[i : i + 1], i, other)])[0], whole[i]), i
    runtime.forward([Piece(tokens[:64], 0, single)])
    third = [11, 12]
    runtime.forward([Piece(case.tokens[100:103], 0, third)])
    mixed = runtime.forward(
        [
            Piece(tokens[70:73], 70, other, every=True),
            Piece(tokens[64:65], 64, single),
            Piece(tokens[80:], 80, pages),
            Piece([5], 3, third),
            Piece(tokens[:20], 0, [14]),
        ]
    )
    assert mixed.shape == (7, 320)
    assert np.array_equal(mixed[:3], whole[70:73])
    assert np.array_equal(mixed[3], whole[64])
    assert np.array_equal(mixed[4], whole[99])
    assert np.array_equal(mixed[6], whole[19])
    steps = [Piece(tokens[73:74], 73, other), Piece(tokens[65:66], 65, single), Piece([6], 4, third)]
    assert np.array_equal(runtime.forward(steps)[:2], whole[[73, 65]])


def test_pages_behind_a_window_may_be_let_go(made: dict[str, Made]) -> None:
    case = made["mistral-window"]
    runtime = opened(case.folder, kv_tokens=256)
    assert (runtime.facts.window, runtime.facts.pages, runtime.facts.context) == (24, 4, 1024)
    runtime.forward([Piece(case.tokens[:128], 0, [0, 1])])
    kept = runtime.forward([Piece(case.tokens[128:200], 128, [0, 1, 2, 3], every=True)]).copy()
    gone = [-1, 1, 2, 3]
    assert np.array_equal(runtime.forward([Piece(case.tokens[128:200], 128, gone, every=True)]), kept)
    wanted = case.logits[128:200]
    assert mean_kl(wanted, kept) < 1e-5
    with pytest.raises(BadRequest, match="not held"):
        runtime.forward([Piece(case.tokens[128:200], 128, [-1, -1, 2, 3])])


def test_one_sequence_goes_round_the_pages_of_a_window(made: dict[str, Made]) -> None:
    case = made["mistral-window"]
    wanted = alone(case.folder).score(case.tokens)
    small = alone(case.folder, kv_tokens=192)
    assert np.array_equal(small.score(case.tokens), wanted)
    with pytest.raises(BadRequest, match="reset to 0"):
        small.reset(10)
    small.reset()
    assert np.array_equal(small.read(case.tokens[:200])[0], wanted[199])


def test_hidden_states_are_what_the_head_reads(made: dict[str, Made]) -> None:
    from safetensors.numpy import load_file

    case = made["llama"]
    runtime = opened(case.folder, exact=True)
    pieces = [Piece(case.tokens[:70], 0, [0, 1]), Piece(case.tokens[:1], 0, [2])]
    hidden = runtime.hidden(pieces)
    assert hidden.shape == (71, 64)
    head = load_file(next(case.folder.glob("*.safetensors")))["model.embed_tokens.weight"].astype(np.float32)
    found = hidden[:70] @ head.T
    assert np.abs(found - case.logits[:70]).max() < 2e-4 * np.abs(case.logits).max()
    assert np.array_equal(hidden[70], hidden[0])


@pytest.mark.parametrize("isa", [row.name for row in available()])
def test_every_instruction_set_runs_the_model(made: dict[str, Made], isa: str) -> None:
    case = made["llama"]
    sequence = alone(case.folder, threads=1, isa=isa)
    assert mean_kl(case.logits[:40], sequence.score(case.tokens[:40])) < 1e-5
    assert np.isfinite(sequence.read([5])).all()


def test_threads_change_no_bit(made: dict[str, Made]) -> None:
    case = made["mistral-window"]
    one, three = (alone(case.folder, threads=t) for t in (1, 3))
    assert np.array_equal(one.score(case.tokens), three.score(case.tokens))
    assert np.array_equal(one.read([7]), three.read([7]))


def test_a_reset_sequence_starts_anew_and_can_go_back(made: dict[str, Made]) -> None:
    case = made["llama"]
    sequence = alone(case.folder, threads=1)
    first = sequence.read(case.tokens[:20]).copy()
    after = sequence.read([9]).copy()
    sequence.reset(20)
    assert np.array_equal(sequence.read([9]), after)
    sequence.reset()
    assert np.array_equal(sequence.read(case.tokens[:20]), first)
    with pytest.raises(BadRequest, match="token 21 of 20"):
        sequence.reset(21)


def test_what_cannot_be_read_is_refused(made: dict[str, Made]) -> None:
    folder = made["llama"].folder
    runtime = opened(folder, threads=1, context=64)
    for tokens, start, pages, said in (
        ([], 0, [0], "at least one"),
        ([320], 0, [0], "0 to 319"),
        ([-1], 0, [0], "0 to 319"),
        ([5] * 5, 60, [0], "65 tokens do not fit the context of 64"),
        ([5], -1, [0], "do not fit"),
        ([5], 0, [], "1 positions do not fit 0 pages"),
        ([5], 0, [runtime.facts.pages], "not held"),
    ):
        with pytest.raises(BadRequest, match=said):
            runtime.forward([Piece(tokens, start, pages)])
    with pytest.raises(BadRequest, match="a pass takes 64"):
        runtime.forward([Piece([5], 0, [0])] * 65)
    with pytest.raises(BadRequest, match="at least one piece"):
        runtime.forward([])
    with pytest.raises(BadRequest, match="8 or 16"):
        opened(folder, head_bits=4)
    with pytest.raises(BadRequest, match="1 to 1024"):
        opened(folder, context=1025)


def test_facts(made: dict[str, Made]) -> None:
    facts = opened(made["mistral-window"].folder).facts
    assert (facts.name, facts.vocab_size, facts.hidden_size) == ("cpu int16", 320, 64)
    assert facts.eos_token_ids == (1,)
    assert facts.bytes_per_page == 2 * 2 * 2 * PAGE * 16 * 2  # keys and values, layers, heads, float16
    assert opened(made["llama"].folder, exact=True).facts.name == "cpu exact"


def test_a_model_the_step_does_not_do_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama", hidden_act="gelu")
    quantize_folder(model, tmp_path / "model", PLAIN)
    with pytest.raises(UnsupportedModel, match="silu"):
        opened(tmp_path / "model")


def test_a_bfloat16_model_that_is_not_quantised_runs(tmp_path: Path) -> None:
    model = tiny_model("llama").bfloat16()
    save_tensors(tmp_path, ((n, p.data) for n, p in model.named_parameters()))
    write_json(tmp_path / "config.json", model.config.to_dict())
    tokens = [5, 6, 7, 8, 9, 10]
    with torch.no_grad():
        wanted = model.float()(torch.tensor([tokens])).logits[0].numpy()
    found = alone(tmp_path, threads=1, exact=True).score(tokens)
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()
