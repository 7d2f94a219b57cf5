"""How much each part of a model matters: KL divergence with nothing but that part quantised, measured.

A model in, numbers out; knows no files. Each part's weights are put in place, a few rows of tokens go
through, and the originals are put back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quantmill.quantize.tuning import kl_divergence

Weights = Callable[[str], Tensor]


def sensitivities(
    model: nn.Module,
    rows: Tensor,
    parts: Mapping[str, Sequence[str]],
    quantised: Weights,
    on_part: Callable[[str], None] = lambda _: None,
) -> tuple[dict[str, float], float]:
    """Mean KL in nats per token of every part alone, and of all of them together.

    rows (n, L) int64; parts: name -> full module names; quantised(module) -> weight (N, K) on any device.
    """
    with torch.no_grad():
        wanted = [_logits(model, ids) for ids in rows]

        def kl(modules: Sequence[str]) -> float:
            with replaced(model, modules, quantised):
                found = [kl_divergence(_logits(model, ids), w) for ids, w in zip(rows, wanted, strict=True)]
            return float(torch.stack(found).mean())

        alone = {}
        for name, modules in parts.items():
            alone[name] = max(0.0, kl(modules))
            on_part(name)
        return alone, kl([m for modules in parts.values() for m in modules])


def _logits(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(ids[None].to(model.device), use_cache=False).logits[0]
    return logits


@contextmanager
def replaced(model: nn.Module, modules: Sequence[str], quantised: Weights) -> Iterator[None]:
    """The model with other weights in some linears for as long as the `with` lasts."""
    originals = {m: model.get_parameter(f"{m}.weight") for m in modules}
    try:
        for module, original in originals.items():
            _put(model, module, quantised(module).to(original.device, original.dtype))
        yield
    finally:
        for module, original in originals.items():
            _put(model, module, original)


def _put(model: nn.Module, module: str, weight: Tensor) -> None:
    model.get_submodule(module).register_parameter("weight", nn.Parameter(weight, requires_grad=False))


def scaled_loss(alone: float, together: float, total: float, loss: float, reference: float) -> float:
    """A part's share of the model's KL at a setting whose layer loss is `loss`, measured at `reference`.

    KL is quadratic in a small error, as the layer loss is, so one measurement gives all settings; the parts'
    sum `total` is brought to what they lose together.
    """
    return alone * (together / total if total > 0 else 1.0) * (loss / reference if reference > 0 else 0.0)
