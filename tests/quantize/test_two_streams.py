"""Pairs of lanes: both streams are what Transformers computes, moments are over the right tokens."""

from __future__ import annotations

import pytest
import torch

from gptq_models import FAMILIES
from quantmill.architectures import ARCHITECTURES, LinearGroup
from quantmill.quantize.moments import Moments
from quantmill.quantize.two_streams import RESIDUAL_WRITERS, Pair, PairedBlock
from tiny_models import tiny_model


class Setup:
    def __init__(self, model_type: str) -> None:
        self.model = tiny_model(model_type, **FAMILIES[model_type]).requires_grad_(False)
        self.groups = ARCHITECTURES[model_type].groups
        self.block = self.model.model.layers[0]
        g = torch.Generator().manual_seed(0)
        size = self.model.config.hidden_size
        self.pairs = [Pair(*(torch.randn(2, 8, size, generator=g) for _ in range(2))) for _ in range(3)]
        kind = getattr(self.model.config, "layer_types", None) if model_type == "gemma3_text" else None
        cos_sin = self.model.model.rotary_emb(
            self.pairs[0].quantised, torch.arange(8)[None], *(kind or ())[:1]
        )
        mask = torch.ones(8, 8, dtype=torch.bool).tril()[None, None]
        self.frame = {"position_embeddings": cos_sin, "attention_mask": mask}


def first(out: object) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("model_type", list(ARCHITECTURES))
def test_streams_are_transformers_own_and_moments_are_complete(model_type: str) -> None:
    s = Setup(model_type)
    seen: dict[str, tuple[Moments, Moments]] = {}

    def at_group(group: LinearGroup, fit: Moments, judge: Moments | None) -> None:
        assert judge is not None
        seen[group.name] = fit, judge

    with torch.no_grad(), PairedBlock(s.block, s.groups, torch.float32) as paired:
        after = paired.run(s.pairs, [s.frame] * 3, 1, True, at_group)
    with torch.no_grad():
        for pair, done in zip(s.pairs, after, strict=True):
            assert torch.allclose(done.quantised, first(s.block(pair.quantised, **s.frame)), atol=1e-5)
            assert torch.allclose(done.original, first(s.block(pair.original, **s.frame)), atol=1e-5)
        normed = [
            (s.block.input_layernorm(p.quantised), s.block.input_layernorm(p.original)) for p in s.pairs
        ]
    assert [*seen] == [g.name for g in s.groups]
    fit, judge = seen[s.groups[0].name]
    assert (fit.tokens, judge.tokens) == (32, 16)
    x = torch.cat([q.flatten(0, 1) for q, _ in normed[:2]])
    o = torch.cat([o.flatten(0, 1) for _, o in normed[:2]])
    assert torch.allclose(fit.cross, o.T @ x, atol=1e-3)
    for name, (fit, _) in seen.items():
        assert (fit.mismatch is not None) == (name in RESIDUAL_WRITERS)
    if "o" not in seen:  # Gemma's passes a norm before it is added
        return
    K = seen["o"][0].cross.shape[0]
    W = torch.zeros(s.model.config.hidden_size, K)
    assert seen["o"][0].goal(W).R.abs().max() > 0  # with no weights at all, what is asked for is the gap


def test_the_residual_gap_is_that_of_the_place_where_the_output_is_added() -> None:
    s = Setup("llama")
    gaps = {}
    original_add = Moments.add

    def spy(self: Moments, x: torch.Tensor, original: torch.Tensor, gap: torch.Tensor | None) -> None:
        gaps.setdefault(x.shape[-1], []).append(gap)
        original_add(self, x, original, gap)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(Moments, "add", spy)
        with PairedBlock(s.block, s.groups, torch.float32) as paired:
            paired.run(s.pairs, [s.frame] * 3, 0, True, lambda *_: None)
        inputs = {}
        for name in ("quantised", "original"):
            h = getattr(s.pairs[0], name)
            attended = s.block.self_attn(s.block.input_layernorm(h), **s.frame)[0]
            inputs[name] = h + attended
    down = s.model.config.intermediate_size
    assert torch.allclose(gaps[down][0], inputs["original"] - inputs["quantised"], atol=1e-5)


def test_only_the_quantised_stream_uses_a_replaced_weight() -> None:
    s = Setup("llama")

    def at_group(group: LinearGroup, _: Moments, __: Moments | None) -> None:
        for module in group.modules:
            paired.taps[module].use(torch.zeros_like(paired.weight(module)))

    with torch.no_grad(), PairedBlock(s.block, s.groups, torch.float32) as paired:
        after = paired.run(s.pairs, [s.frame] * 3, 0, False, at_group)
    with torch.no_grad():
        assert torch.equal(after[0].quantised, s.pairs[0].quantised)
        assert torch.allclose(after[0].original, first(s.block(s.pairs[0].original, **s.frame)), atol=1e-5)
    assert isinstance(s.block.self_attn.q_proj, torch.nn.Linear)


def test_pairs_that_start_again_give_what_waiting_ones_give() -> None:
    s = Setup("qwen2")

    def run(waiting: bool) -> tuple[list[Pair], dict[str, torch.Tensor]]:
        moments: dict[str, torch.Tensor] = {}

        def at_group(group: LinearGroup, fit: Moments, judge: Moments | None) -> None:
            assert judge is not None
            moments[group.name] = torch.cat(
                [fit.hessian.mean(), fit.cross, judge.hessian.mean(), judge.cross]
            )
            for module in group.modules:
                paired.taps[module].use(0.9 * paired.weight(module))

        kept: dict[int, Pair] = {}
        with torch.no_grad(), PairedBlock(s.block, s.groups, torch.float32) as paired:
            frames = [s.frame] * 3
            left = paired.run(s.pairs, frames, 1, True, at_group, keep=kept.__setitem__, waiting=waiting)
        assert left == []
        return [kept[i] for i in range(3)], moments

    (waited, moments), (again, same) = run(True), run(False)
    for a, b in zip(waited, again, strict=True):
        assert torch.equal(a.quantised, b.quantised)
        assert torch.equal(a.original, b.original)
    assert all(torch.equal(moments[name], same[name]) for name in moments)
