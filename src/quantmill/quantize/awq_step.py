"""One block of an AWQ variant: input channels scaled before rounding, the scales folded into what comes before.

    lanes -> Hessian -> scales tried, each with the full solver -> the best kept -> norms and up_proj rescaled

AWQ (Lin et al. 2023, arXiv:2306.00978) multiplies a linear's input channel j by s_j and divides whatever feeds
it by s_j, with s = rms(x)^a / mean|w|^(1 - a), a searched. Rounding is the solver's, with error feedback, so no
scaling is among the candidates and the result is never worse than plain GPTQ on the calibration tokens.

Folding loses nothing: a norm's new weight is rounded to float16 first and s is what that rounding makes of it;
into up_proj, which is solved already, only powers of two are folded.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from quantmill.architectures import LinearGroup
from quantmill.errors import UnsupportedModel
from quantmill.formats.gptq import pack, unpack
from quantmill.quantize.block_step import BlockStep, packed_tensors
from quantmill.quantize.hessian import Hessian
from quantmill.quantize.job import ModuleSolved, OnEvent
from quantmill.quantize.solver import Solution, dequantize, relative_loss, solve_group
from quantmill.quantize.work import SolvedBlock
from quantmill.types import ActOrder, IntLinear, ModuleReport, QuantConfig

if TYPE_CHECKING:
    from quantmill.quantize.lanes import Tap
    from quantmill.quantize.pipeline import Stream
    from quantmill.quantize.shell import Shell

STRENGTHS = (0.15, 0.3, 0.5, 0.7)  # a; besides, no scaling at all
NORMS = {"qkv": "input_layernorm", "gate_up": "post_attention_layernorm"}  # what feeds a group
UP = "mlp.up_proj"  # what feeds "down", channel by channel
LIMIT = 2.0**8  # a scale further from 1 says that a channel is dead


@dataclasses.dataclass(frozen=True, slots=True)
class Scaled:
    """A group solved with its inputs scaled: W s is what the codes stand for."""

    solutions: list[Solution]
    scales: Tensor | None  # s (K,) float32
    strength: float
    loss: float  # the group's, on the calibration tokens


class AwqStep(BlockStep):
    """Solves a block with AWQ's scaling; everything it keeps is as the file will hold it, in GPTQ's layout."""

    def __init__(self, shell: Shell, block: nn.Module, prefix: str, stream: Stream, index: int) -> None:
        super().__init__(shell, block, prefix, stream, index)
        for module in self.tapped.taps:
            out_features, in_features = self.tapped.weight(module).shape
            if reason := refusal(self.config, in_features, out_features):
                raise UnsupportedModel(f"{prefix}{module}: AWQ cannot hold it: {reason}")

    def solve(self, on_event: OnEvent) -> SolvedBlock:
        def at_group(group: LinearGroup, hessian: Hessian) -> None:
            for report in self._solve_group(group, hessian):
                on_event(ModuleSolved(self.stream.variant.branch, report))

        hidden, waiting = self.stream.hidden, self.stream.residence.waiting
        with self.tapped as tapped:
            tapped.run(hidden, self.frames, at_group, keep=lambda *_: None, waiting=waiting)
        # Once more with the weights as stored, so that a resumed run ends with the same bytes.
        return self.replay(SolvedBlock(self.tensors, tuple(self.reports)))

    def _solve_group(self, group: LinearGroup, hessian: Hessian) -> list[ModuleReport]:
        began, tokens = time.perf_counter(), hessian.tokens
        H = hessian.mean()
        weights = [self.tapped.weight(m) for m in group.modules]
        best = solve_scaled(weights, H, self._candidates(group, weights, H), self.config)
        if best.scales is not None:
            self._fold(group, best.scales)
        for module, solution in zip(group.modules, best.solutions, strict=True):
            tap = self.tapped.taps[module]
            bias = None if tap.original.bias is None else tap.original.bias.half()
            packed = pack(solution.linear, self.config, bias)
            self.tensors |= {n: t.cpu() for n, t in packed_tensors(self.prefix + module, packed).items()}
            stored = dequantize(solution.linear)
            tap.use(stored if best.scales is None else stored / best.scales)
        seconds = (time.perf_counter() - began) / len(weights)
        choice = f"activation-aware, strength {best.strength:g}"
        new = [
            ModuleReport(self.prefix + m, s.loss, s.damp_percent, tokens, seconds, s.fallback, choice)
            for m, s in zip(group.modules, best.solutions, strict=True)
        ]
        self.reports.extend(new)
        return new

    def _candidates(
        self, group: LinearGroup, weights: Sequence[Tensor], H: Tensor
    ) -> list[tuple[float, Tensor]]:
        """Scales worth trying, as they can be folded; none where nothing before the group can take them."""
        if group.name in NORMS:
            norm = self._norm(group)
            return [(a, exact_scales(norm, aware_scales(weights, H, a))) for a in STRENGTHS]
        if group.name == "down" and UP in self.tapped.taps:
            powers = [(a, aware_scales(weights, H, a).log2().round().exp2()) for a in STRENGTHS]
            return [(a, s) for a, s in powers if self._up_takes(s)]
        return []

    def _norm(self, group: LinearGroup) -> Tensor:
        return self.tapped.block.get_parameter(f"{NORMS[group.name]}.weight").detach().float()

    def _up_takes(self, scales: Tensor) -> bool:
        """Whether up_proj's float16 scales can be divided by s without rounding."""
        stored = self.tensors[f"{self.prefix}{UP}.scales"].float() / scales.cpu()
        return bool((stored.half().float() == stored).all())

    def _fold(self, group: LinearGroup, scales: Tensor) -> None:
        """Divide what feeds the group by s, in what is kept."""
        if group.name in NORMS:
            name = f"{self.prefix}{NORMS[group.name]}.weight"
            self.tensors[name] = (self._norm(group) / scales).half().cpu()
            return
        for suffix in ("scales", "bias"):
            name = f"{self.prefix}{UP}.{suffix}"
            if name in self.tensors:
                self.tensors[name] = (self.tensors[name].float() / scales.cpu()).half()

    def replay(self, kept: SolvedBlock) -> SolvedBlock:
        hidden, device = self.stream.hidden, self.stream.hidden.device
        norms = [n for n in NORMS.values() if f"{self.prefix}{n}.weight" in kept.tensors]
        weights = {n: self.tapped.block.get_parameter(f"{n}.weight") for n in norms}
        before = {n: weight.data for n, weight in weights.items()}
        with self.tapped as tapped:
            for name in norms:
                weights[name].data = kept.tensors[f"{self.prefix}{name}.weight"].float().to(device)
            for module, tap in tapped.taps.items():
                self._use(tap, kept, module, device)
            tapped.forward(hidden, self.frames, hidden.__setitem__)
        for name, weight in before.items():  # other variants solve the same block
            weights[name].data = weight
        return kept

    def _use(self, tap: Tap, kept: SolvedBlock, module: str, device: torch.device) -> None:
        linear = unpack(self._packed(kept, module))
        moved = (t.to(device) for t in (linear.codes, linear.scales, linear.zeros, linear.g_idx))
        tap.use(dequantize(IntLinear(*moved)))


def refusal(config: QuantConfig, in_features: int, out_features: int) -> str | None:
    """Why AWQ's layout cannot hold a linear of this size, before it is solved."""
    size = in_features if config.group_size == -1 else config.group_size
    if config.act_order is ActOrder.GROUPED:
        return "its groups would follow an act order (g_idx): leave --grouped out"
    if in_features % size:
        return f"groups of {size} do not divide its {in_features} inputs: use another --group-size"
    if out_features % 8:
        return f"its {out_features} outputs are no multiple of 8"
    return None


def aware_scales(weights: Sequence[Tensor], H: Tensor, strength: float) -> Tensor:
    """s (K,) float32: the channels that carry much are made larger, those with large weights smaller.

    weights (N_i, K) of linears that share their inputs, H (K, K) the mean of x x^T. Centred so that the
    largest and the smallest s are inverse to each other, as AutoAWQ does.
    """
    W = torch.cat(list(weights))
    share = W.abs() / W.abs().amax(1, keepdim=True).clamp_min(1e-12)
    x, w = H.diagonal().clamp_min(0).sqrt(), share.mean(0)
    raw = (x.clamp_min(1e-8) ** strength / (w.clamp_min(1e-8) ** (1 - strength) + 1e-4)).clamp_min(1e-4)
    s = raw / (raw.max() * raw.min()).sqrt()
    return s.clamp(1 / LIMIT, LIMIT)


def exact_scales(norm: Tensor, scales: Tensor) -> Tensor:
    """The scales that folding into a norm's float16 weight really applies: norm / half(norm / s)."""
    stored = (norm / scales).half().float()
    usable = (stored != 0) & torch.isfinite(stored) & (norm != 0)
    return torch.where(
        usable, norm / torch.where(usable, stored, torch.ones_like(stored)), torch.ones_like(norm)
    )


def solve_scaled(
    weights: Sequence[Tensor], H: Tensor, candidates: Sequence[tuple[float, Tensor]], config: QuantConfig
) -> Scaled:
    """Solve a group once for every candidate and without scaling; the least error of the outputs wins."""
    tried = [_solved(weights, H, None, 0.0, config)]
    for strength, scales in candidates:
        tried.append(_solved(weights, H, scales, strength, config))
    return min(tried, key=lambda t: t.loss)


def _solved(
    weights: Sequence[Tensor], H: Tensor, scales: Tensor | None, strength: float, config: QuantConfig
) -> Scaled:
    s = torch.ones(len(H), device=H.device) if scales is None else scales
    solutions = solve_group([w * s for w in weights], H / s[:, None] / s, config)
    losses = [relative_loss(w, dequantize(n.linear) / s, H) for w, n in zip(weights, solutions, strict=True)]
    whole = [float(((w @ H) * w).sum()) for w in weights]
    mine = [dataclasses.replace(n, loss=loss) for n, loss in zip(solutions, losses, strict=True)]
    total = sum(part * loss for part, loss in zip(whole, losses, strict=True))
    return Scaled(mine, scales, strength, total)
