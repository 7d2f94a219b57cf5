"""The GPU decoder beside Transformers: families, windows, orders, pages, eight bits; rows alone and together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gptq_models import FAMILIES, write_quantized
from quantmill.errors import BadRequest
from quantmill.runtime.gpu import decoder as gpu
from quantmill.runtime.gpu import pieces, prompts
from quantmill.runtime.gpu.decoder import GpuRuntime
from quantmill.runtime.interface import PAGE, Piece
from quantmill.types import ActOrder, QuantConfig
from tiny_models import tiny_model

FOUR = QuantConfig(bits=4, group_size=32)


def ids_of(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 320, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def wanted_logits(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0]


def made(folder: Path, family: str, config: QuantConfig = FOUR, shuffled: bool = False, **sizes: object):
    model = tiny_model(family, **{"num_hidden_layers": 1, **FAMILIES[family], **sizes})
    return write_quantized(folder, model, config, shuffled=shuffled)


def opened(folder: Path, device: torch.device, **options: object) -> GpuRuntime:
    return GpuRuntime.from_folder(folder, device=device, **{"context": 256, "kv_tokens": 1024, **options})


def pages(first: int, tokens: int) -> tuple[int, ...]:
    return tuple(range(first, first + -(-tokens // PAGE)))


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    found = found.cpu().float()
    return float((found - wanted).norm() / wanted.norm())


def read(runtime: GpuRuntime, ids: list[int], prompt: int, first: int = 0) -> torch.Tensor:
    """Logits after every token: a prompt, then single tokens."""
    place = pages(first, len(ids))
    parts = [runtime.forward([Piece(ids[:prompt], 0, place, every=True)]).cpu().clone()]
    for at in range(prompt, len(ids)):
        parts.append(runtime.forward([Piece(ids[at : at + 1], at, place)]).cpu().clone())
    return torch.cat(parts)


@pytest.mark.parametrize("family", ["mistral", "llama", "qwen2", "qwen3"])
def test_logits_are_those_of_transformers(family, tmp_path, device):
    twin = made(tmp_path, family, num_hidden_layers=2)
    runtime, ids = opened(tmp_path, device), ids_of(20)
    assert error(read(runtime, ids, 18), wanted_logits(twin, ids)) < 5e-3
    assert runtime.facts.window == (8 if family == "mistral" else None)


def test_the_newest_logits_are_the_last_of_all(tmp_path, device):
    made(tmp_path, "llama", num_hidden_layers=2)
    runtime, ids = opened(tmp_path, device), ids_of(70)
    every = runtime.forward([Piece(ids, 0, pages(0, 70), every=True)]).cpu().clone()
    newest = runtime.forward([Piece(ids, 0, pages(0, 70))]).cpu()
    assert newest.shape == (1, every.shape[1])
    assert error(newest, every[-1:]) < 2e-3


@pytest.mark.parametrize("by_torch", [False, True])
def test_filler_behind_a_prompt_changes_nothing(by_torch, tmp_path, device, monkeypatch):
    """What graphs of prompts rest on: two pieces of a text in passes of more rows than they have tokens."""
    monkeypatch.setattr(prompts, "LEAST_ROWS", 16 if by_torch else 1 << 20)
    made(tmp_path, "llama")
    runtime, ids, place, halves = opened(tmp_path, device), ids_of(40), pages(0, 40), ((0, 20), (20, 40))
    wanted = [runtime.forward([Piece(ids[a:b], a, place)]).cpu().clone() for a, b in halves]
    cache, found = runtime.model.caches[0], []
    before = [t.clone() for t in (cache.keys, cache.values)]
    with torch.inference_mode():
        for first, last in halves:
            runtime._pieces._send(ids[first:last], first, place, 32)
            start = pieces._graphs_start(by_torch and first == 0)
            found.append(runtime._pieces._last(32, *start).cpu())
    assert all(error(a, b) < 2e-3 for a, b in zip(found, wanted, strict=True))
    for mine, old in zip((cache.keys, cache.values), before, strict=True):
        assert error(mine, old.cpu().float()) < 2e-3
        assert torch.equal(mine[:, :, 40:], old[:, :, 40:])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs need a GPU")
@pytest.mark.parametrize("count", [30, 64, 500, 512])
def test_a_prompts_second_pass_is_a_graph(count, tmp_path, device):
    made(tmp_path, "llama", num_hidden_layers=2, max_position_embeddings=1024)
    runtime = opened(tmp_path, device, context=1024)
    for start in (0, 100):
        texts = [ids_of(count, seed) for seed in range(4)]
        passes = [runtime.forward([Piece(t, start, pages(0, start + count))]).clone() for t in texts]
        graphs = len(runtime._pieces._graphs)
        assert graphs
        runtime._pieces._graphs.clear()
        runtime._pieces._seen.clear()
        for text, found in zip(texts, passes, strict=True):
            runtime._pieces._seen.clear()
            wanted = runtime.forward([Piece(text, start, pages(0, start + count))])
            assert torch.equal(wanted, found)
    every = runtime.forward([Piece(texts[0], 100, pages(0, 100 + count), every=True)])
    assert error(passes[0], every[-1:].cpu().float()) < 5e-3


@pytest.mark.parametrize("window", [64, 100])
def test_prompts_longer_than_the_window(window, tmp_path, device):
    """Pages before the window are gone: -1."""
    twin = made(tmp_path, "mistral", sliding_window=window)
    runtime, ids = opened(tmp_path, device), ids_of(200)
    wanted, most = wanted_logits(twin, ids), pages(0, 200)
    first = runtime.forward([Piece(ids[:150], 0, most, every=True)]).cpu().clone()
    assert error(first, wanted[:150]) < 5e-3
    gone = max(0, 150 - window + 1) // PAGE
    kept = (-1,) * gone + most[gone:]
    second = runtime.forward([Piece(ids[150:197], 150, kept, every=True)]).cpu().clone()
    assert error(second, wanted[150:197]) < 5e-3
    gone = max(0, 197 - window + 1) // PAGE
    kept = (-1,) * gone + most[gone:]
    third = runtime.forward([Piece(ids[197:200], 197, kept, every=True)]).cpu()
    assert error(third, wanted[197:]) < 5e-3


@pytest.mark.parametrize(
    ("config", "shuffled"),
    [
        (QuantConfig(bits=4, group_size=16, act_order=ActOrder.GROUPED), True),
        (QuantConfig(bits=3, group_size=32), False),
        (QuantConfig(bits=8, group_size=-1), False),
        (QuantConfig(bits=4, group_size=24, act_order=ActOrder.GROUPED), True),  # groups have to be filled up
    ],
)
def test_bits_groups_and_orders(config, shuffled, tmp_path, device):
    twin = made(tmp_path, "llama", config, shuffled)
    ids = ids_of(19)
    assert error(read(opened(tmp_path, device), ids, 18), wanted_logits(twin, ids)) < 5e-3


def test_linears_that_cannot_be_one(tmp_path, device):
    """The k projection is left dense, so queries, keys and values stay apart."""
    twin = tiny_model("llama", num_hidden_layers=1)
    write_quantized(tmp_path, twin, FOUR, skip=("k_proj",))
    ids = ids_of(18)
    assert error(read(opened(tmp_path, device), ids, 17), wanted_logits(twin, ids)) < 5e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_quantised_head_and_both_dtypes(dtype, tmp_path, device):
    if dtype == torch.bfloat16 and device.type != "cuda":
        pytest.skip("Triton's interpreter cannot multiply bfloat16")
    twin = tiny_model("llama", num_hidden_layers=1)
    write_quantized(tmp_path, twin, FOUR, head=True)
    ids = ids_of(20)
    runtime = opened(tmp_path, device, dtype=dtype)
    assert runtime.facts.name.endswith("bf16" if dtype == torch.bfloat16 else "fp16")
    limit = 5e-2 if dtype == torch.bfloat16 else 5e-3
    assert error(read(runtime, ids, 17), wanted_logits(twin, ids)) < limit


def test_an_eight_bit_cache(tmp_path, device):
    twin = made(tmp_path, "llama")
    runtime, ids = opened(tmp_path, device, kv_dtype="fp8"), ids_of(67)
    assert error(read(runtime, ids, 66), wanted_logits(twin, ids)) < 4e-2
    assert runtime.facts.bytes_per_page == 2 * PAGE * 2 * (16 + 2)


def test_a_rows_bits_do_not_depend_on_the_batch(tmp_path, device):
    """Prompts, single tokens and several tokens of one sequence, alone and together."""
    made(tmp_path, "llama")
    runtime = opened(tmp_path, device)
    texts = [ids_of(n, seed=n) for n in (20, 3, 18, 5)]
    pieces = [Piece(t, 0, pages(4 * i, 64), every=i == 1) for i, t in enumerate(texts)]
    together = runtime.forward(pieces).clone()
    alone = torch.cat([runtime.forward([p]).clone() for p in pieces])
    assert torch.equal(together, alone)
    follow = [Piece([5 + i], len(t), pages(4 * i, 64)) for i, t in enumerate(texts)]
    follow[2] = Piece([7, 8], 18, pages(8, 64), every=True)
    together = runtime.forward(follow).clone()
    assert torch.equal(together, torch.cat([runtime.forward([p]).clone() for p in follow]))
    single = [runtime.forward([Piece([t], 18 + i, pages(8, 64))])[0].clone() for i, t in enumerate((7, 8))]
    assert torch.equal(torch.stack(single), together[2:4])


def test_hidden_states(tmp_path, device):
    twin = made(tmp_path, "llama")
    ids = ids_of(21)
    with torch.inference_mode():
        wanted = twin.model(torch.tensor([ids])).last_hidden_state[0]
    states = opened(tmp_path, device).hidden([Piece(ids[:2], 0, (2,)), Piece(ids, 0, (3,))])
    assert states.dtype == np.float32
    assert error(torch.from_numpy(states), torch.cat([wanted[:2], wanted])) < 5e-3


def test_products_beyond_fp16(tmp_path, device):
    """Gates and ups of some thousands: their product does not fit fp16, the logits are right."""
    twin = tiny_model("llama", num_hidden_layers=1)
    for layer in twin.model.layers:
        layer.post_attention_layernorm.weight.data *= 900
        layer.mlp.down_proj.weight.data /= 900
    write_quantized(tmp_path, twin, QuantConfig(bits=8, group_size=32), skip=("down_proj",))
    runtime, ids = opened(tmp_path, device), ids_of(20)
    assert runtime.model.weights.blocks[0].shrink > 1
    seen = []
    down = twin.model.layers[0].mlp.down_proj
    handle = down.register_forward_pre_hook(lambda _, x: seen.append(float(x[0].abs().max())))
    wanted = wanted_logits(twin, ids)
    handle.remove()
    assert max(seen) > 65504
    assert error(read(runtime, ids, 17), wanted) < 1e-2


def test_refusals(tmp_path, device):
    made(tmp_path, "llama")
    runtime = opened(tmp_path, device, context=64)
    for piece in (
        Piece([320], 0, (0,)),
        Piece([], 0, (0,)),
        Piece([1] * 65, 0, (0, 1)),
        Piece([1], 64, (0, 1)),
    ):
        with pytest.raises(BadRequest):
            runtime.forward([piece])
    with pytest.raises(BadRequest, match="pages"):
        runtime.forward([Piece([1], 0, ())])
    with pytest.raises(BadRequest, match="fp16 or fp8"):
        opened(tmp_path, device, kv_dtype="int4")
    runtime.close()


def test_long_prompts_pass_in_parts(tmp_path, device, monkeypatch):
    monkeypatch.setattr(gpu, "AT_ONCE", 18)
    twin = made(tmp_path, "llama")
    ids = ids_of(36)
    logits = opened(tmp_path, device).forward([Piece(ids, 0, (2,), every=True)])
    assert error(logits, wanted_logits(twin, ids)) < 5e-3


@pytest.mark.parametrize("shuffled", [False, True])
def test_many_rows(shuffled, tmp_path, device, monkeypatch):
    """Through dense copies of some outputs at a time and torch's attention, as long prompts go."""
    for name, value in (("FEW", 16), ("DENSE_ROWS", 18), ("DENSE_OUTPUTS", 128)):
        monkeypatch.setattr(f"quantmill.runtime.gpu.projection.{name}", value)
    monkeypatch.setattr("quantmill.runtime.gpu.prompts.LEAST_ROWS", 16)
    order = ActOrder.GROUPED if shuffled else ActOrder.STATIC
    twin = made(tmp_path, "qwen2", QuantConfig(bits=4, group_size=16, act_order=order), shuffled)
    ids = ids_of(21)
    assert error(read(opened(tmp_path, device), ids, 20), wanted_logits(twin, ids)) < 5e-3


@pytest.mark.parametrize("shuffled", [False, True])
def test_fused_steps(shuffled, tmp_path, device):
    """Norms, residuals and gates at the linears' ends, beside kernels between them and beside Transformers."""
    from quantmill.runtime.gpu import fused

    order = ActOrder.GROUPED if shuffled else ActOrder.STATIC
    config = QuantConfig(bits=4, group_size=32, act_order=order)
    twin = made(tmp_path, "qwen2", config, shuffled, intermediate_size=128)
    runtime, ids = opened(tmp_path, device, fused=True), ids_of(30)
    if not fused.can_fuse(runtime.model):
        pytest.skip("the linears' ends run on a GPU only")
    wanted = wanted_logits(twin, ids)
    mine = read(runtime, ids, 20)
    assert error(mine, wanted) < 5e-3
    assert (
        error(torch.from_numpy(runtime.hidden([Piece(ids[:3], 0, (3,))])), runtime_states(twin, ids)) < 5e-3
    )
    assert runtime.model.fused
    plain = read(opened(tmp_path, device, fused=False), ids, 20)
    assert error(plain, mine) < 3e-3
    assert not torch.equal(plain[20:], mine[20:]), "these are two ways"


def runtime_states(twin: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return twin.model(torch.tensor([ids[:3]])).last_hidden_state[0]
