"""AWQ's scales of input channels: which are worth trying, and how they fold into what feeds a group, without loss.

AWQ (Lin et al. 2023, arXiv:2306.00978) multiplies a linear's input channel j by s_j and divides whatever feeds
it by s_j, with s = rms(x)^a / mean|w|^(1 - a), a searched. Here an error in a channel is made up for by later
ones, so what counts of a channel is not rms(x) but what is left then, the pivot of its column (solver.py); and
the square root of s is tried as well, because error feedback leaves less to gain and as much to lose.

Folding loses nothing: a norm's new weight is rounded to float16 first and s is what that rounding makes of it;
into up_proj, which is solved already, only powers of two are folded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from quantmill.architectures import LinearGroup
from quantmill.errors import UnsupportedModel
from quantmill.quantize.solver import factorise
from quantmill.types import ActOrder, QuantConfig

Candidate = tuple[str, Tensor]  # in words, s (K,) float32

STRENGTHS = ((0.2, 0.5), (0.2, 1.0), (0.4, 0.5), (0.4, 1.0))  # a, and the power of s; besides, no scaling
NORMS = {"qkv": "input_layernorm", "gate_up": "post_attention_layernorm"}  # what feeds a group
UP = "mlp.up_proj"  # what feeds "down", channel by channel
GROUPS = (128, 64, 32)  # what readers of AWQ take
LIMIT = 2.0**8  # a scale further from 1 says that a channel is dead


class Folding:
    """What feeds the groups of one block. `kept` are the block's tensors as the file will hold them, so far."""

    def __init__(self, block: nn.Module, prefix: str, kept: dict[str, Tensor]) -> None:
        self.block, self.prefix, self.kept = block, prefix, kept

    def candidates(self, group: LinearGroup, weights: Sequence[Tensor], cost: Tensor) -> list[Candidate]:
        """Scales worth trying, as they can be folded; none where nothing before the group can take them.

        cost (K,): what an error in a channel costs, as `pivots` gives it.
        """
        wanted = ((said(a, power), aware_scales(weights, cost, a, power)) for a, power in STRENGTHS)
        if group.name in NORMS:
            norm = self.norm(group)
            return [(name, exact_scales(norm, s)) for name, s in wanted]
        if group.name == "down" and f"{self.prefix}{UP}.scales" in self.kept:
            powers = ((name, s.log2().round().exp2()) for name, s in wanted)
            return [(name, s) for name, s in powers if self._up_takes(s)]
        return []

    def norm(self, group: LinearGroup) -> Tensor:
        """The weight (K,) float32 of the norm that feeds a group of `NORMS`."""
        return self.block.get_parameter(f"{NORMS[group.name]}.weight").detach().float()

    def _up_takes(self, scales: Tensor) -> bool:
        """Whether up_proj's float16 scales can be divided by s without rounding."""
        stored = self.kept[f"{self.prefix}{UP}.scales"].float() / scales.cpu()
        return bool((stored.half().float() == stored).all())

    def fold(self, group: LinearGroup, scales: Tensor) -> None:
        """Divide what feeds the group by s, in what is kept."""
        if group.name in NORMS:
            name = f"{self.prefix}{NORMS[group.name]}.weight"
            self.kept[name] = (self.norm(group) / scales).half().cpu()
            return
        for suffix in ("scales", "bias"):
            name = f"{self.prefix}{UP}.{suffix}"
            if name in self.kept:
                self.kept[name] = (self.kept[name].float() / scales.cpu()).half()


def refuse_shapes(shapes: Iterable[tuple[str, tuple[int, int]]], config: QuantConfig) -> None:
    """Raise UnsupportedModel, naming the module, where AWQ's layout cannot hold (name, (N, K))."""
    for name, (out_features, in_features) in shapes:
        if reason := refusal(config, in_features, out_features):
            raise UnsupportedModel(f"{name}: AWQ cannot hold it: {reason}")


def refusal(config: QuantConfig, in_features: int, out_features: int) -> str | None:
    """Why AWQ's layout cannot hold a linear of this size, before it is solved."""
    size = in_features if config.group_size == -1 else config.group_size
    if config.act_order is ActOrder.GROUPED:
        return "its groups would follow an act order (g_idx): leave --grouped out"
    if in_features % size:
        fits = next((g for g in GROUPS if in_features % g == 0), None)
        cure = f"use --group-size {fits}" if fits else "leave --format awq out"
        return f"groups of {size} do not divide its {in_features} inputs: {cure}"
    if out_features % 8:
        return f"its {out_features} outputs are no multiple of 8"
    return None


def said(strength: float, power: float) -> str:
    return f"strength {strength:g}" if power == 1 else f"strength {strength:g} to the power {power:g}"


def pivots(H: Tensor, config: QuantConfig) -> Tensor:
    """What an error in every column costs once later columns have made up for it, (K,) float32."""
    factor, _ = factorise(H, config)
    cost = torch.empty_like(factor.cost)
    cost[factor.order] = factor.cost
    return cost


def aware_scales(weights: Sequence[Tensor], cost: Tensor, strength: float, power: float = 1.0) -> Tensor:
    """s (K,) float32: the channels that carry much are made larger, those with large weights smaller.

    weights (N_i, K) of linears that share their inputs, cost (K,) the mean square that a channel carries.
    Centred so that the largest and the smallest s are inverse to each other, as AutoAWQ does.
    """
    W = torch.cat(list(weights))
    share = W.abs() / W.abs().amax(1, keepdim=True).clamp_min(1e-12)
    x, w = cost.clamp_min(0).sqrt(), share.mean(0)
    raw = (x.clamp_min(1e-8) ** strength / (w.clamp_min(1e-8) ** (1 - strength) + 1e-4)).clamp_min(1e-4)
    raw = raw**power
    s = raw / (raw.max() * raw.min()).sqrt()
    return s.clamp(1 / LIMIT, LIMIT)


def exact_scales(norm: Tensor, scales: Tensor) -> Tensor:
    """The scales that folding into a norm's float16 weight really applies: norm / half(norm / s)."""
    stored = (norm / scales).half().float()
    usable = (stored != 0) & torch.isfinite(stored) & (norm != 0)
    return torch.where(
        usable, norm / torch.where(usable, stored, torch.ones_like(stored)), torch.ones_like(norm)
    )
