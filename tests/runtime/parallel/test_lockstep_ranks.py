"""Ranks of the CPU runtime, by turns in one process: together they give what one rank gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gptq_models import FAMILIES, write_quantized
from lockstep import LockstepTeam, together
from quantmill.checkpoint import open_checkpoint
from quantmill.runtime.cpu.runtime import CpuRuntime
from quantmill.runtime.cpu.settings import MODEL_TYPES
from quantmill.runtime.interface import Piece
from quantmill.runtime.parallel.part import part_for
from quantmill.types import ActOrder, QuantConfig
from tiny_models import tiny_model

IDS = [int(i) for i in np.random.default_rng(5).integers(2, 320, 21)]
FOUR = QuantConfig(bits=4, group_size=32)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("QUANTMILL_HOME", str(tmp_path_factory.getbasetemp() / "home"))


def made(folder: Path, family: str, config: QuantConfig = FOUR, shuffled: bool = False, **sizes: Any) -> Path:
    write_quantized(folder, tiny_model(family, **{**FAMILIES[family], **sizes}), config, shuffled=shuffled)
    return folder


def read(folder: Path, team: LockstepTeam | None, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Logits after every token of a prompt and of single tokens, and final states."""
    runtime = CpuRuntime.from_folder(folder, threads=1, kv_tokens=256, team=team, **options)
    parts = [runtime.forward([Piece(IDS[:18], 0, [2], every=True)]).copy()]
    parts += [runtime.forward([Piece([IDS[i]], i, [2])]).copy() for i in range(18, 21)]
    return np.concatenate(parts), runtime.hidden([Piece(IDS[:5], 0, [0]), Piece(IDS[:1], 0, [1])])


def refuse_difference(folder: Path, ranks: int) -> None:
    wanted, states = read(folder, None, exact=True)
    results = together(ranks, lambda team: read(folder, team, exact=True))
    assert np.abs(results[0][0] - wanted).max() < 1e-5 * np.abs(wanted).max()
    assert np.abs(results[0][1] - states).max() < 1e-5 * np.abs(states).max()
    assert all(np.array_equal(results[0][1], other[1]) for other in results[1:]), "all hold one residual"


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_families(family: str, tmp_path: Path) -> None:
    refuse_difference(made(tmp_path, family), 2)


@pytest.mark.parametrize(
    ("config", "shuffled", "ranks"),
    [
        (QuantConfig(bits=4, group_size=16, act_order=ActOrder.GROUPED), True, 2),
        (
            QuantConfig(bits=3, group_size=64, sym=False, act_order=ActOrder.GROUPED),
            True,
            2,
        ),  # groups are cut
        (QuantConfig(bits=8, group_size=-1), False, 2),
        (QuantConfig(bits=2, group_size=24, act_order=ActOrder.GROUPED), True, 4),  # two ranks for a key
        (QuantConfig(bits=3, group_size=32), False, 3),
    ],
)
def test_bits_groups_orders_and_ranks(
    config: QuantConfig, shuffled: bool, ranks: int, tmp_path: Path
) -> None:
    refuse_difference(made(tmp_path, "llama", config, shuffled), ranks)


def test_integer_activations_and_dense_linears(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    write_quantized(tmp_path, model, FOUR, skip=("k_proj", "down_proj"))
    wanted = read(tmp_path, None)[0]
    found = together(2, lambda team: read(tmp_path, team))[0][0]
    assert np.abs(found - wanted).max() < 2e-3 * np.abs(wanted).max()


def test_a_rows_bits_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    made(tmp_path, "llama")

    def job(team: LockstepTeam) -> tuple[np.ndarray, np.ndarray]:
        runtime = CpuRuntime.from_folder(tmp_path, threads=1, kv_tokens=256, team=team)
        pieces = [Piece(IDS[:9], 0, [0]), Piece(IDS[3:4], 0, [1]), Piece(IDS[5:8], 0, [2])]
        together_ = runtime.forward(pieces).copy()
        return together_, np.concatenate([runtime.forward([p]).copy() for p in pieces])

    found, alone = together(3, job)[0]
    assert np.array_equal(found, alone)


def test_a_bias_behind_a_sum_is_added_once(tmp_path: Path) -> None:
    made(tmp_path, "llama")
    whole = open_checkpoint(tmp_path)
    name = "model.layers.0.self_attn.o_proj.bias"
    whole.tensors[name] = whole.tensors["model.layers.0.self_attn.o_proj.scales"]
    rounds: dict[int, dict[int, Any]] = {}
    first, second = (part_for(whole, LockstepTeam(rounds, rank, 2)) for rank in range(2))
    assert name in first.tensors
    assert name not in second.tensors


def test_ranks_keep_their_packed_weights_apart(tmp_path: Path) -> None:
    """Two ranks of a model may be of one shape."""
    made(tmp_path, "llama", num_key_value_heads=2)
    seen = together(2, lambda team: CpuRuntime.from_folder(tmp_path, threads=1, kv_tokens=64, team=team))
    first, second = (r._store.linears["0.o"].weights for r in seen)
    assert first.shape == second.shape
    assert not np.array_equal(first, second)
    assert torch.equal(torch.tensor(seen[0].facts.pages), torch.tensor(seen[1].facts.pages))
