"""`check --fix` and act order: what is moved is bit for bit what was there, and the model computes the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gptq_models import edit_json, write_quantized
from quantmill.checkpoint import open_checkpoint
from quantmill.doctor import check, fix
from quantmill.formats.gptq import dequantize, is_sequential
from quantmill.types import ActOrder, Level, QuantConfig
from tiny_models import byte_level_tokenizer, tiny_model

WEIGHTS = "model.safetensors"
MLP, ATTENTION = "model.layers.1.mlp", "model.layers.1.self_attn"


def make(
    folder: Path, family: str, config: QuantConfig, *, skip: tuple[str, ...] = (), **settings: int
) -> nn.Module:
    """A grouped folder with every g_idx shuffled; returns its twin."""
    more = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1} if family == "phi3" else {}
    model = tiny_model(family, **more, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        write_quantized(folder, model, config, shuffled=True, skip=skip)
    byte_level_tokenizer().save_pretrained(folder)
    return model


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """What the folder's linears stand for, and the rest of its tensors."""
    checkpoint = open_checkpoint(folder)
    packed = {m: checkpoint.packed(m) for m in checkpoint.quantized_modules()}
    found = {f"{m}.weight": dequantize(p, torch.float64) for m, p in packed.items()}
    found |= {f"{m}.bias": p.bias.double() for m, p in packed.items() if p.bias is not None}
    return found | {
        n: checkpoint.load(n).double() for n in checkpoint.tensors if n.endswith((".weight", ".bias"))
    }


def logits(folder: Path, twin: nn.Module) -> torch.Tensor:
    """The folder's model in float64."""
    model = twin.double().eval()
    missing = model.load_state_dict(weights(folder), strict=False)
    assert not missing.unexpected_keys
    assert not missing.missing_keys
    with torch.no_grad():
        return model(torch.arange(2, 40)[None]).logits


def g_idx(folder: Path, module: str) -> torch.Tensor:
    return open_checkpoint(folder).packed(module).g_idx.long()


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
@pytest.mark.parametrize(("bits", "intermediate"), [(2, 96), (3, 72), (4, 96), (8, 72)])
def test_the_order_of_down_moves_into_gate_and_up(
    tmp_path: Path, family: str, bits: int, intermediate: int
) -> None:
    folder = tmp_path / "model"
    config = QuantConfig(bits, 32, ActOrder.GROUPED)
    twin = make(folder, family, config, intermediate_size=intermediate)
    before, said, down = weights(folder), logits(folder, twin), f"{MLP}.down_proj"
    order = torch.argsort(g_idx(folder, down), stable=True)
    notes = fix(folder).notes
    assert any("2 modules (down_proj) moved" in note for note in notes)
    after = weights(folder)
    assert is_sequential(g_idx(folder, down).int(), 32)
    assert torch.equal(after[f"{down}.weight"], before[f"{down}.weight"][:, order])
    if family == "phi3":
        rows = {f"{MLP}.gate_up_proj": torch.cat([order, order + intermediate])}
    else:
        rows = {f"{MLP}.gate_proj": order, f"{MLP}.up_proj": order}
    for module, index in rows.items():
        assert torch.equal(after[f"{module}.weight"], before[f"{module}.weight"][index])
    moved = {f"model.layers.{i}.mlp.{m.rpartition('.')[2]}" for i in range(2) for m in (down, *rows)}
    for name in before.keys() - {f"{m}.weight" for m in moved}:
        assert torch.equal(after[name], before[name]), name
    torch.testing.assert_close(logits(folder, twin), said, rtol=0, atol=1e-10)
    assert check(folder).ok
    assert fix(folder).notes == ()


def test_plain_rows_and_biases_move_too(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    twin = make(folder, "llama", QuantConfig(4, 32, ActOrder.GROUPED), skip=("gate_proj",))
    tensors = load_file(folder / WEIGHTS)
    tensors[f"{MLP}.up_proj.bias"] = torch.arange(96).half()
    save_file(tensors, folder / WEIGHTS)
    order = torch.argsort(g_idx(folder, f"{MLP}.down_proj"), stable=True)
    gate = tensors[f"{MLP}.gate_proj.weight"]
    assert any("(down_proj) moved" in note for note in fix(folder).notes)
    after = load_file(folder / WEIGHTS)
    assert torch.equal(after[f"{MLP}.gate_proj.weight"], gate[order])
    assert torch.equal(after[f"{MLP}.up_proj.bias"], order.half())
    assert twin is not None


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_an_order_within_heads_moves_from_o_into_v(tmp_path: Path, family: str) -> None:
    folder = tmp_path / "model"
    more = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1} if family == "phi3" else {}
    twin = write_quantized(folder, tiny_model(family, **more), QuantConfig(4, 8, ActOrder.GROUPED))
    byte_level_tokenizer().save_pretrained(folder)
    o = f"{ATTENTION}.o_proj"
    tensors = load_file(folder / WEIGHTS)
    generator = torch.Generator().manual_seed(5)
    orders = [torch.randperm(16, generator=generator) for _ in range(2)]  # heads 0 and 1, 2 and 3 share one
    heads = tensors[f"{o}.g_idx"].view(4, 16)
    tensors[f"{o}.g_idx"] = torch.cat([heads[h][orders[h // 2]] for h in range(4)]).contiguous()
    save_file(tensors, folder / WEIGHTS)
    before, said = weights(folder), logits(folder, twin)
    assert check(folder).loaders["vllm"] != "yes"
    assert any("1 module (o_proj) moved" in note for note in fix(folder).notes)
    assert is_sequential(g_idx(folder, o).int(), 8)
    after = weights(folder)
    assert not torch.equal(after[f"{o}.weight"], before[f"{o}.weight"])
    assert torch.equal(after[f"{o}.weight"].sort(1).values, before[f"{o}.weight"].sort(1).values)
    torch.testing.assert_close(logits(folder, twin), said, rtol=0, atol=1e-10)
    assert {f.level for f in check(folder).findings} == {Level.OK}


def test_heads_that_do_not_share_an_order_keep_their_gather(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_quantized(folder, tiny_model("llama"), QuantConfig(4, 8, ActOrder.GROUPED))
    byte_level_tokenizer().save_pretrained(folder)
    o = f"{ATTENTION}.o_proj"
    tensors = load_file(folder / WEIGHTS)
    generator = torch.Generator().manual_seed(5)
    heads = tensors[f"{o}.g_idx"].view(4, 16)
    tensors[f"{o}.g_idx"] = torch.cat([heads[h][torch.randperm(16, generator=generator)] for h in range(4)])
    save_file(tensors, folder / WEIGHTS)
    before = (folder / WEIGHTS).read_bytes()
    fix(folder)
    assert (folder / WEIGHTS).read_bytes() == before
    finding = next(f for f in check(folder).findings if "permutes the groups" in f.message)
    assert "every reader must honour it" in finding.message


@pytest.mark.parametrize("settings", [{"model_type": "gpt_neox"}, {"intermediate_size": 64}])
def test_what_is_not_known_is_left_alone(tmp_path: Path, settings: dict[str, object]) -> None:
    folder = tmp_path / "model"
    make(folder, "llama", QuantConfig(4, 32, ActOrder.GROUPED))
    edit_json(folder / "config.json", **settings)
    before = (folder / WEIGHTS).read_bytes()
    fix(folder)
    assert (folder / WEIGHTS).read_bytes() == before
