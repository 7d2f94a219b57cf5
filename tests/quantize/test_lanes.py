"""Lanes: a tapped block computes what the block computes, stops at every group once, and sees the right inputs."""

from __future__ import annotations

import pytest
import torch

from gptq_models import FAMILIES
from quantmill.architectures import ARCHITECTURES, LinearGroup
from quantmill.quantize.hessian import Hessian
from quantmill.quantize.lanes import TappedBlock
from tiny_models import tiny_model


def block_and_frame(model_type: str, hidden: torch.Tensor):
    """The first block of a tiny model, and what its model passes to it."""
    model = tiny_model(model_type, **FAMILIES[model_type])
    block, frames = model.model.layers[0], []
    handle = block.register_forward_pre_hook(lambda _, args, kwargs: frames.append(kwargs), with_kwargs=True)
    model.model(inputs_embeds=hidden, use_cache=False)
    handle.remove()
    return block, frames[0]


@pytest.mark.parametrize("waiting", [True, False])
@pytest.mark.parametrize("model_type", list(ARCHITECTURES))
def test_outputs_and_inputs_are_the_blocks_own(model_type: str, waiting: bool) -> None:
    hidden = [torch.randn(2, 12, 64) for _ in range(3)]
    groups = ARCHITECTURES[model_type].groups
    with torch.inference_mode():
        block, frame = block_and_frame(model_type, hidden[0])
        expected = [block(h, **frame) for h in hidden]
        seen: dict[str, list[torch.Tensor]] = {g.name: [] for g in groups}
        for g in groups:
            block.get_submodule(g.modules[0]).register_forward_pre_hook(
                lambda _, args, name=g.name: seen[name].append(args[0])
            )
        for h in hidden:
            block(h, **frame)
        visited: dict[str, Hessian] = {}
        out: list[torch.Tensor] = []
        with TappedBlock(block, groups, torch.float32) as tapped:
            tapped.run(
                hidden,
                [frame] * 3,
                lambda g, h: visited.update({g.name: h}),
                keep=lambda i, h: out.insert(i, h),
                waiting=waiting,
            )
    for a, b in zip(out, expected, strict=True):
        assert torch.allclose(a, b[0] if isinstance(b, tuple) else b, atol=1e-5)
    assert list(visited) == [g.name for g in groups]
    for name, xs in seen.items():
        x = torch.cat([t.reshape(-1, t.shape[-1]) for t in xs])
        assert visited[name].tokens == len(x) == 72
        assert torch.allclose(visited[name].mean(), x.T @ x / len(x), atol=1e-4)


def test_a_later_group_sees_what_was_decided_at_an_earlier_one() -> None:
    hidden = [torch.randn(2, 8, 64)]
    with torch.inference_mode():
        block, frame = block_and_frame("llama", hidden[0])
        inputs: dict[str, torch.Tensor] = {}

        def run(change: bool) -> None:
            with TappedBlock(block, ARCHITECTURES["llama"].groups, torch.float32) as tapped:

                def at_group(group: LinearGroup, hessian: Hessian) -> None:
                    if change and group.name == "o":
                        tapped.taps["self_attn.o_proj"].use(
                            torch.zeros_like(tapped.weight("self_attn.o_proj"))
                        )
                    inputs[f"{group.name} {change}"] = hessian.mean()

                tapped.run(hidden, [frame], at_group, keep=lambda *_: None)

        run(False)
        run(True)
    assert torch.equal(inputs["qkv False"], inputs["qkv True"])
    assert torch.equal(inputs["o False"], inputs["o True"])
    assert not torch.allclose(inputs["gate_up False"], inputs["gate_up True"])


def test_the_block_is_as_it_was_afterwards() -> None:
    block, _ = block_and_frame("qwen2", torch.randn(1, 4, 64))
    before = dict(block.named_modules())
    with TappedBlock(block, ARCHITECTURES["qwen2"].groups, torch.float32):
        assert dict(block.named_modules()).keys() != before.keys()
    assert all(dict(block.named_modules())[k] is v for k, v in before.items())


def test_a_table_that_does_not_match_the_block_is_our_error() -> None:
    hidden = [torch.randn(1, 4, 64)]
    with torch.inference_mode():
        block, frame = block_and_frame("llama", hidden[0])
        wrong = tuple(reversed(ARCHITECTURES["llama"].groups))
        with (
            TappedBlock(block, wrong, torch.float32) as tapped,
            pytest.raises(RuntimeError, match="the block runs"),
        ):
            tapped.run(hidden, [frame], lambda *_: None, keep=lambda *_: None)


@pytest.mark.parametrize("k", [3, 4, 5, 64, 130])
def test_hessian_is_the_mean_outer_product(k: int) -> None:
    x = torch.randn(57, k)
    hessian = Hessian(k, torch.device("cpu"))
    hessian.add(x[:20].view(4, 5, k))
    hessian.add(x[20:])
    mean = hessian.mean()
    assert torch.equal(mean, mean.T)
    assert torch.allclose(mean, x.T @ x / 57, atol=1e-5)
