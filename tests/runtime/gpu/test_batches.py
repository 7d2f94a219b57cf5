"""How many rows a decode step takes, and that it does not show."""

from __future__ import annotations

import pytest
import torch

from gptq_models import FAMILIES, write_quantized
from quantmill.runtime.gpu import batches
from quantmill.runtime.gpu.decoder import SHORT, GpuRuntime
from quantmill.runtime.gpu.steps import MOST_ROWS
from quantmill.runtime.interface import Piece
from quantmill.types import QuantConfig
from tiny_models import tiny_model


@pytest.fixture
def said(monkeypatch):
    """Sets $QUANTMILL_BATCHES for one test."""

    def say(word: str) -> None:
        monkeypatch.setenv(batches.BATCHES, word)
        batches.fast_batches.cache_clear()

    yield say
    monkeypatch.undo()
    batches.fast_batches.cache_clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("batches")
    model = tiny_model("llama", **{"num_hidden_layers": 1, **FAMILIES["llama"]})
    write_quantized(place, model, QuantConfig(bits=4, group_size=32))
    return place


def opened(folder, device) -> GpuRuntime:
    options = {"context": 128, "kv_tokens": 80 * 64, "selftest": device.type == "cuda"}
    return GpuRuntime.from_folder(folder, device=device, **options)


def counted(runtime: GpuRuntime) -> list[int]:
    """Rows of every step from now on. A step gives a row's number, counted over all of them."""
    seen: list[int] = []

    def run(pieces, logits=True):
        rows, before = sum(len(p.tokens) for p in pieces), sum(seen)
        seen.append(rows)
        return torch.arange(before, before + rows, dtype=torch.float32)[:, None]

    runtime._steps.run = run
    return seen


@pytest.mark.parametrize(("word", "sizes"), [("", (64, 32)), ("same", (64, 32)), ("fast", (32,))])
def test_sizes(word, sizes, said):
    said(word)
    assert batches.step_sizes() == sizes


def test_more_rows_than_have_the_same_bits_are_several_steps(folder, device):
    runtime = opened(folder, device)
    most = runtime._steps.at_once
    assert most == (runtime.model.alike or 32)
    assert runtime.facts.by_row == SHORT
    assert "fast" not in runtime.facts.name
    pieces = [Piece([i + 5], 0, (i,)) for i in range(most + 3)]
    pieces[2] = Piece([9, 8, 7], 0, (2,), every=True)
    pieces[most - 3] = Piece([1, 2, 3, 4], 0, (most - 3,))  # does not fit the first step, and shows one row
    seen = counted(runtime)
    rows = runtime.forward(pieces)[:, 0].tolist()
    assert seen == [most - 1, 9]
    assert rows == [*range(most - 1), *range(most + 2, most + 8)]


def test_fast_batches_are_one_step_and_say_so(folder, device, said):
    said(batches.FAST)
    runtime = opened(folder, device)
    assert runtime.facts.name.endswith(", fast batches")
    assert runtime._steps.at_once == MOST_ROWS
    seen = counted(runtime)
    runtime.forward([Piece([i + 5], 0, (i,)) for i in range(70)])
    assert seen == [70]


def test_a_row_among_many_has_the_bits_that_it_has_alone(folder, device):
    if device.type != "cuda":
        pytest.skip("the interpreter knows no fused steps: tests/runtime/gpu/test_decoder.py has few rows")
    runtime = opened(folder, device)
    pieces = [Piece([i + 5, i], 0, (i,)) for i in range(70)]
    together = runtime.forward(pieces).clone()
    for i, piece in enumerate(pieces):
        assert torch.equal(together[i], runtime.forward([piece])[0]), i
