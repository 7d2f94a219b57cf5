"""Ranks of the GPU decoder, by turns in one process: together they give what one rank gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gptq_models import FAMILIES, write_quantized
from lockstep import together
from quantmill.runtime.gpu.decoder import GpuRuntime
from quantmill.runtime.interface import Piece
from quantmill.runtime.opening import open_runtime
from quantmill.runtime.parallel.opening import SHARE_GPU
from quantmill.runtime.parallel.sums import Nccl, OneShot
from quantmill.runtime.parallel.team import SUMS, Team
from quantmill.types import ActOrder, QuantConfig
from tiny_models import tiny_model

FOUR = QuantConfig(bits=4, group_size=32)
IDS = torch.randint(0, 320, (18,), generator=torch.Generator().manual_seed(3)).tolist()


def logits(folder: Path, device: torch.device, team=None) -> torch.Tensor:
    """After a prompt, and after a single token; on a GPU the self-test of the rank's own linears runs first."""
    on_gpu = device.type == "cuda"
    runtime = GpuRuntime.from_folder(
        folder, device=device, context=64, kv_tokens=128, selftest=on_gpu, fused=False, team=team
    )
    found = [runtime.forward([Piece(IDS[:17], 0, (1,), every=True)]).cpu().clone()]
    found.append(runtime.forward([Piece(IDS[17:], 17, (1,))]).cpu().clone())
    runtime.close()
    return torch.cat(found)


@pytest.mark.parametrize(
    ("family", "config", "shuffled", "ranks"),
    [
        pytest.param("mistral", FOUR, False, 2, marks=pytest.mark.slow),
        pytest.param("qwen2", QuantConfig(bits=8, group_size=-1), False, 2, marks=pytest.mark.slow),
        ("qwen3", QuantConfig(bits=4, group_size=16, act_order=ActOrder.GROUPED), True, 2),
        pytest.param(  # groups are cut
            "llama",
            QuantConfig(bits=3, group_size=64, act_order=ActOrder.GROUPED),
            True,
            4,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_ranks_together_are_one(family, config, shuffled, ranks, tmp_path, device):
    sizes = {"num_hidden_layers": 1, **FAMILIES[family]}
    write_quantized(tmp_path, tiny_model(family, **sizes), config, shuffled=shuffled)
    wanted = logits(tmp_path, device)
    results = together(ranks, lambda team: logits(tmp_path, device, team))
    assert float((results[0] - wanted).norm() / wanted.norm()) < 3e-3
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("way", ["nccl", "one-shot"])
def test_sums_are_part_of_graphs(way, tmp_path, device, monkeypatch):
    """A team of one: its sums change nothing, but go through every graph."""
    if device.type != "cuda":
        pytest.skip("NCCL needs a GPU")
    monkeypatch.setenv(SUMS, way)
    write_quantized(tmp_path, tiny_model("llama"), FOUR)
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    team = Team(meeting, 0, 1, device, nccl=True)
    assert team.captured
    assert type(team._ways[0]) is {"nccl": Nccl, "one-shot": OneShot}[way]
    assert torch.equal(logits(tmp_path, device, team), logits(tmp_path, device))


@pytest.mark.parametrize("way", ["gloo", "one-shot"])
def test_two_processes_share_a_gpu(way, tmp_path, device, monkeypatch):
    """Sums through gloo without graphs, or in graphs by memory that both see: the tokens of one process."""
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    monkeypatch.setenv(SHARE_GPU, "1")
    monkeypatch.setenv(SUMS, way)
    monkeypatch.setenv("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
    write_quantized(tmp_path, tiny_model("llama"), FOUR)
    told = []
    for ranks in (1, 2):
        options = {"context": 64, "kv_tokens": 128, "selftest": False, "tensor_parallel": ranks}
        runtime = open_runtime(tmp_path, device="cuda", **options)
        tokens = list(IDS)
        for _ in range(16):
            start = len(tokens) - 1 if len(tokens) > len(IDS) else 0
            tokens.append(int(runtime.forward([Piece(tokens[start:], start, (0,))])[-1].argmax()))
        if ranks == 2:
            assert bool(runtime._local._steps._graphs) == (way == "one-shot")
        runtime.close()
        told.append(tokens)
    assert told[0] == told[1]


@pytest.mark.slow
def test_shrinks_hold_for_the_sum(tmp_path, device):
    """Gates and ups of some thousands: each rank alone would divide by less."""
    twin = tiny_model("llama", num_hidden_layers=1)
    for layer in twin.model.layers:
        layer.post_attention_layernorm.weight.data *= 900
        layer.mlp.down_proj.weight.data /= 900
    write_quantized(tmp_path, twin, QuantConfig(bits=8, group_size=32), skip=("down_proj",))

    def shrinks(team) -> list[float]:
        runtime = GpuRuntime.from_folder(tmp_path, device=device, context=64, kv_tokens=64, team=team)
        return [b.shrink for b in runtime.model.weights.blocks]

    (alone,) = shrinks(None)
    first, second = together(2, shrinks)
    assert first == second
    assert first[0] >= alone > 1
