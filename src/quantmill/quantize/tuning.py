"""Scales and norms by gradient, codes fixed: one block on its output, or the whole model on its logits.

    block   ||block_q(x_q) - block_o(x_o)||^2 over the block's output channels
    model   KL(original || quantised) of the next-token distributions

Adam on relative changes with a cosine schedule; every `LOOK` steps the loss of held-out batches is taken,
on scales and norms rounded as they are stored, and the best of those states is what is returned: tuning
never ends worse on held-out tokens than it began. (EfficientQAT, Chen et al. 2024, arXiv:2407.11062, trains
scales alike, on hard labels.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantmill.quantize.presets import Schedule
from quantmill.quantize.scaled import ScaledLinear, ScaledNorm, Trainable

LOOK = 25  # steps between two looks at the held-out loss


@dataclass(frozen=True, slots=True)
class Tuned:
    """Held-out loss before and after, and the step it was reached at."""

    before: float
    after: float
    step: int


BatchLoss = Callable[[int], Tensor]


def tune(
    modules: Trainable,
    schedule: Schedule,
    fit_loss: BatchLoss,
    fit_batches: int,
    held_loss: BatchLoss,
    held_batches: int,
    seed: int = 0,
) -> Tuned:
    """Train the changes in `modules`; afterwards they hold the state with the least held-out loss."""
    groups = _rates(modules, schedule)
    fused = all(p.is_cuda for group in groups for p in group["params"])
    optimiser = torch.optim.Adam(groups, lr=schedule.rate, betas=(0.9, 0.95), fused=fused)
    generator = torch.Generator().manual_seed(seed)
    before = best = _judge(modules, held_loss, held_batches)
    kept, at = _snapshot(modules), 0
    order: list[int] = []
    for step in range(1, schedule.steps + 1):
        order = order or torch.randperm(fit_batches, generator=generator).tolist()
        for group in optimiser.param_groups:
            group["lr"] = group["rate"] * _pace(step / schedule.steps, schedule.warmup)
        optimiser.zero_grad(set_to_none=True)
        with torch.enable_grad():
            loss: Any = fit_loss(order.pop())  # backward is untyped in torch
            loss.backward()
        optimiser.step()
        with torch.no_grad():
            for linear in changed_scales(modules).values():
                linear.confine()
        if step % LOOK == 0 or step == schedule.steps:
            now = _judge(modules, held_loss, held_batches)
            if now < best:
                best, kept, at = now, _snapshot(modules), step
    _restore(modules, kept)
    return Tuned(before, best, at)


def _rates(modules: Trainable, schedule: Schedule) -> list[dict[str, Any]]:
    linears = list(changed_scales(modules).values())
    norms = [m.change for m in modules.values() if isinstance(m, ScaledNorm)]
    codes = [m.latent for m in linears if m.latent is not None]
    return [
        {"params": [m.change for m in linears], "rate": schedule.rate},
        {"params": norms, "rate": schedule.norm_rate},
        *([{"params": codes, "rate": schedule.code_rate}] if codes else []),
    ]


def _pace(done: float, warmup: float) -> float:
    """Share of the full learning rate: a linear rise, then a cosine down to nothing."""
    rise = min(1.0, done / warmup) if warmup else 1.0
    return rise * 0.5 * (1 + math.cos(math.pi * done))


def _snapshot(modules: Trainable) -> list[tuple[Tensor, Tensor | None]]:
    """Changes of scales and norms, and codes as they are rounded."""
    latents = [m.latent if isinstance(m, ScaledLinear) else None for m in modules.values()]
    return [
        (m.change.detach().clone(), None if u is None else u.detach().round().to(torch.int16))
        for m, u in zip(modules.values(), latents, strict=True)
    ]


def _restore(modules: Trainable, kept: Sequence[tuple[Tensor, Tensor | None]]) -> None:
    with torch.no_grad():
        for module, (change, codes) in zip(modules.values(), kept, strict=True):
            module.change.copy_(change)
            if codes is not None and isinstance(module, ScaledLinear) and module.latent is not None:
                module.latent.copy_(codes)


def _judge(modules: Trainable, held_loss: BatchLoss, batches: int) -> float:
    """Mean held-out loss with everything rounded as it would be stored."""
    exact = [m.change.detach().clone() for m in modules.values()]
    with torch.no_grad():
        for module in modules.values():
            _round_as_stored(module)
        total = sum(float(held_loss(i)) for i in range(batches))
        for module, change in zip(modules.values(), exact, strict=True):
            module.change.copy_(change)
    return total / max(1, batches)


def _round_as_stored(module: ScaledLinear | ScaledNorm) -> None:
    if isinstance(module, ScaledLinear):
        module.change.copy_(module.stored().scales.float() / module.scales - 1)
    else:
        nothing = module.weight == 0
        whole = torch.where(nothing, torch.ones_like(module.weight), module.weight)
        module.change.copy_(torch.where(nothing, torch.zeros_like(whole), module.stored() / whole - 1))


def kl_divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """Mean over tokens of KL(wanted || logits), both (..., V) before softmax."""
    log_p = torch.log_softmax(wanted.float(), -1)
    log_q = torch.log_softmax(logits.float(), -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def changed_scales(modules: Mapping[str, nn.Module]) -> dict[str, ScaledLinear]:
    """Only the linears."""
    return {name: m for name, m in modules.items() if isinstance(m, ScaledLinear)}
