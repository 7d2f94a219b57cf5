"""A stream's tokens are those of forward and the sampler, token for token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gptq_models import write_quantized
from quantmill.errors import BadRequest
from quantmill.runtime.gpu import stream as streams
from quantmill.runtime.gpu.decoder import GpuRuntime
from quantmill.runtime.interface import Piece
from quantmill.runtime.sampling import SamplerState, sample
from quantmill.types import QuantConfig, SamplingParams
from tiny_models import tiny_model

GREEDY = SamplingParams(temperature=0, repetition_penalty=1)
WARM = SamplingParams(temperature=1.5, top_k=30, top_p=0.9, repetition_penalty=1, seed=7)


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory, device: torch.device) -> GpuRuntime:
    folder: Path = tmp_path_factory.mktemp("model")
    write_quantized(folder, tiny_model("llama", num_hidden_layers=1), QuantConfig(bits=4, group_size=32))
    return GpuRuntime.from_folder(folder, device=device, context=128, kv_tokens=512)


def one_by_one(runtime: GpuRuntime, piece: Piece, params: SamplingParams, count: int) -> list[int]:
    state, found = SamplerState(params, piece.tokens), []
    logits = runtime.forward([piece])
    while True:
        found.append(sample(logits[0].cpu().numpy(), state).token)
        if len(found) == count:
            return found
        logits = runtime.forward([Piece(found[-1:], len(piece.tokens) + len(found) - 1, piece.pages)])


def test_the_tokens_are_the_samplers(runtime, monkeypatch):
    monkeypatch.setattr(streams, "HALF", 2)
    monkeypatch.setattr(streams, "RING", 4)
    monkeypatch.setattr(streams.drawing, "RING", 4)
    pieces = [Piece([5, 6, 7], 0, (0, 1)), Piece(list(range(20)), 0, (2, 3))]
    params = [GREEDY, WARM]
    states = [SamplerState(p, ()) for p in params]
    found = list(runtime.stream(pieces, states, 8))
    for i in range(2):
        assert [f[i] for f in found] == one_by_one(runtime, pieces[i], params[i], 8)
        assert states[i].step == 8


def test_what_a_stream_does_not_do(runtime):
    piece = Piece([5, 6, 7], 0, (0, 1))
    penalised = SamplerState(SamplingParams(repetition_penalty=1.1), [5])
    with pytest.raises(BadRequest, match="alone"):
        next(runtime.stream([piece], [penalised], 8))
    with pytest.raises(BadRequest, match="context"):
        next(runtime.stream([piece], [SamplerState(GREEDY)], 127))
    assert streams.can_stream(WARM)
    assert not streams.can_stream(SamplingParams(min_p=0.1))
