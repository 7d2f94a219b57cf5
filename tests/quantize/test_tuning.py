"""Scales, norms, codes by gradient: exact gradients, only what was asked for moves, held-out loss never rises."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

from quantmill.quantize.block_tuning import tune_block
from quantmill.quantize.distill import affordable, distill
from quantmill.quantize.presets import Schedule
from quantmill.quantize.scaled import Grouping, ScaledLinear, ScaledNorm, norm_names, trainable
from quantmill.quantize.solver import dequantize, solve
from quantmill.quantize.tuning import kl_divergence, tune
from quantmill.types import IntLinear, QuantConfig
from tiny_models import tiny_model


def solved(weight: torch.Tensor, bits: int = 3, group: int = 16) -> IntLinear:
    K = weight.shape[1]
    return solve(weight, torch.eye(K), QuantConfig(bits=bits, group_size=group)).linear


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("group", [8, 16, -1])
def test_gradients_are_autograds(bits: int, group: int) -> None:
    torch.manual_seed(0)
    linear = solved(torch.randn(6, 24), bits, group)
    module = ScaledLinear(linear, torch.randn(6), torch.float32)
    x = torch.randn(2, 5, 24, requires_grad=True)
    module(x).square().sum().backward()
    own = x.grad.clone(), module.change.grad.clone()
    x.grad = None
    change = torch.zeros_like(module.change, requires_grad=True)
    g = linear.g_idx.long()
    W = (linear.scales.float() * (1 + change))[:, g] * (linear.codes.float() - linear.zeros.float()[:, g])
    (x @ W.T + module.bias).square().sum().backward()
    assert torch.allclose(own[0], x.grad, rtol=1e-4, atol=1e-4)
    assert torch.allclose(own[1], change.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("columns", "size"), [(24, 8), (24, 24), (20, 8), (24, 1), (7, 16)])
@pytest.mark.parametrize("shuffled", [False, True])
def test_groups_side_by_side_or_not_are_the_same(columns: int, size: int, shuffled: bool) -> None:
    torch.manual_seed(0)
    g = torch.arange(columns) // size
    g = g[torch.randperm(columns)] if shuffled else g
    groups = Grouping.read(g.to(torch.int32), int(g.max()) + 1)
    assert groups.side == (
        0 if shuffled and not torch.equal(g, torch.arange(columns) // size) else min(size, columns)
    )
    values, weights = torch.randn(3, groups.groups), torch.randn(3, columns)
    assert torch.equal(groups.spread(values), values[:, g])
    wanted = torch.stack([weights[:, g == i].sum(1) for i in range(groups.groups)], 1)
    assert torch.allclose(groups.sum(weights), wanted, atol=1e-6)


@pytest.mark.parametrize("sym", [True, False])
def test_latents_that_lean_towards_the_weight_are_stored_as_they_were_solved(sym: bool) -> None:
    torch.manual_seed(0)
    weight, config = torch.randn(6, 24), QuantConfig(bits=2, group_size=8, sym=sym)
    linear = solve(weight, torch.eye(24), config).linear
    lean = ScaledLinear(linear, None, torch.float32, config.max_code, weight, lean=1.0)
    assert lean.latent is not None
    assert not torch.equal(lean.latent, lean.latent.round())
    assert torch.equal(lean.stored().codes, linear.codes)
    steps = linear.scales.float()[:, linear.g_idx.long()]
    inside = (weight - dequantize(linear)).abs() < 0.4 * steps.abs()
    inside &= (linear.codes > 0) & (linear.codes < config.max_code)  # none that the grid's ends hold back
    assert inside.any()
    found = steps * lean.latent
    assert torch.allclose(found[inside], weight[inside], atol=1e-5)


def test_untrained_it_is_the_packed_linear() -> None:
    torch.manual_seed(0)
    linear = solved(torch.randn(6, 24))
    module, x = ScaledLinear(linear, None, torch.float32), torch.randn(3, 24)
    assert torch.allclose(module(x), x @ dequantize(linear).T, atol=1e-6)
    assert torch.equal(module.stored().scales, linear.scales)


@pytest.mark.parametrize("sym", [True, False])
def test_latent_codes_get_the_gradient_of_what_they_are_rounded_to(sym: bool) -> None:
    torch.manual_seed(0)
    weight, config = torch.randn(6, 24), QuantConfig(bits=2, group_size=8, sym=sym)
    linear = solve(weight, torch.eye(24), config).linear
    module, x = ScaledLinear(linear, None, torch.float32, config.max_code), torch.randn(5, 24)
    assert torch.equal(module.stored().codes, linear.codes)
    module(x).square().sum().backward()
    W = dequantize(linear).requires_grad_()
    (x @ W.T).square().sum().backward()
    steps = linear.scales.float()[:, linear.g_idx.long()]
    assert torch.allclose(module.latent.grad, W.grad * steps, rtol=1e-4, atol=1e-4)


def test_codes_stay_on_the_grid_and_move_by_whole_steps() -> None:
    torch.manual_seed(0)
    linear = solved(torch.randn(6, 24), bits=2, group=8)
    module = ScaledLinear(linear, None, torch.float32, 3)
    with torch.no_grad():
        module.latent += 0.4
        assert torch.equal(module.stored().codes, linear.codes)
        module.latent += 0.2
        module.confine()
        assert torch.equal(module.stored().codes, (linear.codes + 1).clamp(max=3))
        module.latent -= 100
        module.confine()
    assert int(module.stored().codes.max()) == 0


def test_a_scale_that_leaves_float16_keeps_its_old_value() -> None:
    linear = solved(torch.randn(2, 16))
    module = ScaledLinear(linear, None, torch.float32)
    with torch.no_grad():
        module.change[0] = -1.0
        module.change[1] = 1e9
    assert torch.equal(module.stored().scales, linear.scales)


def model_and_linears() -> tuple[nn.Module, dict[str, IntLinear]]:
    model = tiny_model("llama").requires_grad_(False)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in n]
    return model, {n: solved(model.get_submodule(n).weight.float(), 2, 32) for n in names}


def test_everything_is_put_back() -> None:
    model, linears = model_and_linears()
    before = {n: id(m) for n, m in model.named_modules()}
    with trainable(model, linears, norm_names(model), torch.float32) as new:
        assert sum(isinstance(m, ScaledNorm) for m in new.values()) == 5
        assert isinstance(model.get_submodule(next(iter(linears))), ScaledLinear)
    assert before == {n: id(m) for n, m in model.named_modules()}


def test_distillation_lowers_held_out_kl_and_keeps_codes() -> None:
    original, linears = model_and_linears()
    student = copy.deepcopy(original, memo={id(p): p for p in original.parameters()})
    blocks = torch.randint(0, 300, (20, 24), generator=torch.Generator().manual_seed(0))
    schedules = (
        Schedule(50, 1e-2, 1e-2),
        Schedule(2, 1e-4, 1e-4, code_rate=1e-3),
    )  # the second flips no code
    done = distill(student, original, linears, blocks, 6, schedules, dict.fromkeys(linears, 3), batch=4)
    assert done.tuned.after < 0.9 * done.tuned.before
    assert done.tuned.step > 0
    assert all(torch.equal(q.codes, linears[n].codes) for n, q in done.linears.items())
    with torch.no_grad():
        for name, q in done.linears.items():
            student.get_submodule(name).weight = nn.Parameter(dequantize(q))
        for name, w in done.norms.items():
            student.get_submodule(name).weight = nn.Parameter(w)
        found = kl_divergence(student(blocks[14:]).logits, original(blocks[14:]).logits)
    assert float(found) == pytest.approx(done.tuned.after, rel=0.05)  # what is stored is what was judged


def test_training_mends_codes_that_were_rounded_wrongly() -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 32)
    linear = solved(weight, bits=3, group=16)
    wrong = torch.where(torch.rand(16, 32) < 0.2, (linear.codes.int() + 1).clamp(max=7), linear.codes.int())
    module = ScaledLinear(dataclasses.replace(linear, codes=wrong.to(torch.uint8)), None, torch.float32, 7)
    rows = torch.randn(6, 256, 32)

    def loss(i: int) -> torch.Tensor:
        return (module(rows[i]) - rows[i] @ weight.T).square().mean()

    schedule = Schedule(100, 1e-3, 1e-3, code_rate=3e-2)
    done = tune({"it": module}, schedule, loss, 5, lambda i: loss(5 + i), 1)
    right = (rows[5] @ (dequantize(linear) - weight).T).square().mean()
    assert done.after < 0.5 * done.before
    assert done.after < 1.6 * float(right)


def test_block_tuning_lowers_the_blocks_error() -> None:
    model, linears = model_and_linears()
    block, prefix = model.model.layers[0], "model.layers.0."
    own = {n.removeprefix(prefix): q for n, q in linears.items() if n.startswith(prefix)}
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(8, 32, 64, generator=g) for _ in range(6)]
    frame = {"position_embeddings": model.model.rotary_emb(inputs[0], torch.arange(32)[None])}
    with torch.no_grad():
        out = [block(x, **frame) for x in inputs]
    wanted = [o[0] if isinstance(o, tuple) else o for o in out]
    done = tune_block(
        block, own, inputs, wanted, [frame] * 6, 1, Schedule(75, 3e-3, 3e-3), dict.fromkeys(own, 3)
    )
    assert done.tuned.after < 0.99 * done.tuned.before
    assert set(done.norms) == {"input_layernorm", "post_attention_layernorm"}


def test_training_that_only_hurts_is_not_kept() -> None:
    original, linears = model_and_linears()
    student = copy.deepcopy(original)
    blocks = torch.randint(0, 300, (6, 16), generator=torch.Generator().manual_seed(0))
    done = distill(
        student,
        original,
        linears,
        blocks,
        2,
        (Schedule(25, 100.0, 100.0),),
        dict.fromkeys(linears, 3),
        batch=2,
    )
    assert done.tuned.step == 0
    assert done.tuned.after == done.tuned.before
    assert all(torch.equal(q.scales, linears[n].scales) for n, q in done.linears.items())


def test_codes_are_trained_only_where_there_is_room() -> None:
    scales, codes = Schedule(1, 1e-3, 1e-3), Schedule(1, 1e-3, 1e-3, code_rate=1e-2)
    assert affordable((scales, codes), 10**9, 20 * 10**9) == ((scales, codes), "")
    kept, remark = affordable((scales, codes), 10**9, 20 * 10**9 - 1)
    assert kept == (scales,)
    assert "20 GB asked" in remark
