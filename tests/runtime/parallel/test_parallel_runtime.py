"""Ranks as processes: the same tokens as one process, the engine on top, a rank that dies, and what is refused."""

from __future__ import annotations

import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gptq_models import write_quantized
from quantmill.errors import BadRequest, QuantmillError, UnsupportedModel
from quantmill.runtime import opening
from quantmill.runtime.interface import Piece, Runtime
from quantmill.runtime.llm import LLM
from quantmill.runtime.opening import open_runtime
from quantmill.runtime.parallel.messages import pieces_from, pieces_to
from quantmill.runtime.parallel.opening import gpus_shared
from quantmill.runtime.parallel.runtime import ParallelRuntime
from quantmill.runtime.single import SingleSequence
from quantmill.types import ActOrder, QuantConfig, SamplingParams
from tiny_models import tiny_model


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setattr(opening, "gpu_count", lambda: 0)
    monkeypatch.setenv("QUANTMILL_HOME", str(tmp_path_factory.getbasetemp() / "home"))


@pytest.fixture(scope="module")
def llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantised folder with a tokenizer."""
    folder = tmp_path_factory.mktemp("quantised")
    write_quantized(folder, tiny_model("llama"), QuantConfig(bits=4, group_size=32))
    for file in tiny_llama.glob("token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def opened(folder: Path, ranks: int, **options: Any) -> Runtime:
    return open_runtime(
        folder, device="cpu", threads=2, tensor_parallel=ranks, **{"kv_tokens": 512, **options}
    )


def greedy(runtime: Runtime, prompt: list[int], count: int) -> list[int]:
    sequence, tokens = SingleSequence(runtime), list(prompt)
    for _ in range(count):
        tokens.append(int(np.argmax(sequence.go_on_to(tokens)[0])))
    return tokens[len(prompt) :]


@pytest.mark.slow
@pytest.mark.model
def test_a_real_model_says_the_same_on_two_ranks(smol: Path, tmp_path: Path) -> None:
    """Nine heads, three keys: two groups of heads on one rank, one on the other. True act order."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smol, dtype=torch.float32)
    config = QuantConfig(bits=4, group_size=64, act_order=ActOrder.GROUPED)
    write_quantized(tmp_path, model, config, shuffled=True)
    prompts = np.random.default_rng(1).integers(100, 40000, (4, 12)).tolist()  # one alone may end in a loop
    told = []
    for ranks in (1, 2):
        runtime = opened(tmp_path, ranks, exact=True)
        told.append([greedy(runtime, prompt, 8) for prompt in prompts])
        runtime.close()
    assert told[0] == told[1]
    assert len(set().union(*told[0])) > 5


def test_facts_and_batches(llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        two = opened(llama, 2)
    one = opened(llama, 1)
    assert isinstance(two, ParallelRuntime)
    assert two.facts.name == "cpu int16, 2 ranks"
    assert "cpu int16, 2 ranks" in caplog.text
    assert two.facts.pages == one.facts.pages
    assert two.facts.vocab_size == one.facts.vocab_size
    pieces = [Piece(list(range(5, 25)), 0, [0], every=True), Piece([7], 0, np.array([3]))]  # type: ignore[arg-type]
    wanted, found = one.forward(pieces).copy(), np.array(two.forward(pieces))
    assert found.shape == wanted.shape == (21, 320)
    assert np.abs(found - wanted).max() < 1e-3 * np.abs(wanted).max()
    assert np.abs(two.hidden(pieces) - one.hidden(pieces)).max() < 0.02
    with pytest.raises(BadRequest, match="0 to 319"):
        two.forward([Piece([320], 0, [0])])
    assert np.array_equal(two.forward(pieces[1:]), found[20:]), "a refusal ends nothing"
    two.close()
    two.close()


def test_the_engine_runs_over_ranks(llama: Path) -> None:
    params = [SamplingParams(temperature=t, max_new_tokens=6, seed=3) for t in (0.0, 0.8, 0.8)]
    prompts = ["the cat sat", "old house by", "rain"]
    answers = []
    for ranks in (1, 2):
        with LLM(llama, device="cpu", threads=2, exact=True, kv_tokens=512, tensor_parallel=ranks) as llm:
            answers.append([a.text for a in llm.generate(prompts, params)])
    assert answers[0] == answers[1]


def test_a_rank_that_dies_ends_the_pass_with_one_line(llama: Path) -> None:
    runtime = opened(llama, 2)
    assert isinstance(runtime, ParallelRuntime)
    runtime.forward([Piece([5, 6], 0, [0])])
    meeting = Path(runtime._workers.meeting)
    assert meeting.is_dir()
    (process,) = runtime._workers._processes
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(QuantmillError, match=r"rank 1 of 2 was killed by signal 9.*start again"):
        runtime.forward([Piece([7], 2, [0])])
    runtime.close()
    assert not meeting.exists()


def test_ranks_end_with_the_runtime(llama: Path) -> None:
    runtime = opened(llama, 2)
    assert isinstance(runtime, ParallelRuntime)
    (process,) = runtime._workers._processes
    del runtime  # without close, as a program that ends
    began = time.monotonic()
    while process.poll() is None and time.monotonic() - began < 120:
        time.sleep(0.05)
    assert process.returncode == 0


def test_what_cannot_be_shared_is_refused_before_loading(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[object] = []
    monkeypatch.setattr(ParallelRuntime, "start", started.append)
    with pytest.raises(BadRequest, match="use --tensor-parallel 4 or less"):
        opened(llama, 5)
    tiny_model("gpt2", n_embd=64, n_layer=1, n_head=4, n_positions=64).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="gpt2"):
        opened(tmp_path, 2)
    monkeypatch.setattr(opening, "_check_device", lambda device: None)
    for device, why in (("cuda:1", "CUDA_VISIBLE_DEVICES chooses"), ("cuda", "exact means float32")):
        with pytest.raises(BadRequest, match=why):
            open_runtime(llama, device=device, exact=device == "cuda", tensor_parallel=2)
    assert started == []


def test_ranks_need_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not gpus_shared(2, 2)
    for gpus, cure in ((1, "--tensor-parallel 1"), (3, "--tensor-parallel 3")):
        with pytest.raises(BadRequest, match=f"4 ranks need 4 GPUs, {gpus} are visible here: use {cure}"):
            gpus_shared(4, gpus)
    monkeypatch.setenv("QUANTMILL_SHARE_GPU", "1")
    assert gpus_shared(2, 1)


def test_passes_travel_as_they_are() -> None:
    pieces = [Piece([1, 2], 5, (0, -1, 7), True), Piece(np.array([3]), np.int64(2), range(2))]  # type: ignore[arg-type]
    assert pieces_from(pieces_to(pieces)) == [
        Piece([1, 2], 5, [0, -1, 7], True),
        Piece([3], 2, [0, 1], False),
    ]
