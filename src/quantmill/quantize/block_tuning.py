"""`--tune-blocks`: a solved block's scales, norms and codes, trained until its output is the original's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantmill.quantize.arithmetic import tensor_cores
from quantmill.quantize.presets import Schedule
from quantmill.quantize.scaled import ScaledNorm, norm_names, trainable
from quantmill.quantize.tuning import Tuned, changed_scales, tune
from quantmill.types import IntLinear


@dataclass(frozen=True, slots=True)
class TunedBlock:
    """The linears as trained, the norms that changed, and what it brought."""

    linears: dict[str, IntLinear]
    norms: dict[str, Tensor]
    tuned: Tuned


def tune_block(
    block: nn.Module,
    linears: Mapping[str, IntLinear],
    inputs: Sequence[Tensor],
    wanted: Sequence[Tensor],
    frames: Sequence[Mapping[str, Any]],
    held: int,
    schedule: Schedule,
    max_codes: Mapping[str, int],
    dtype: torch.dtype = torch.float32,
) -> TunedBlock:
    """Train on all lanes but the last `held`, judge on those.

    inputs: hidden states (B, L, hidden) in the quantised stream; wanted: the block's outputs in the original;
    max_codes: the largest code of every linear.
    """
    cut = len(inputs) - held
    codes = max_codes if schedule.code_rate else None
    with (
        torch.inference_mode(False),
        tensor_cores(),
        trainable(block, linears, norm_names(block), dtype, codes, schedule.lean) as modules,
    ):
        scale = 1.0 / float(wanted[0].var())

        def loss(lane: int) -> Tensor:
            out = block(inputs[lane].clone(), **frames[lane])
            first: Tensor = out[0] if isinstance(out, tuple) else out
            return (first - wanted[lane].clone()).square().mean() * scale

        tuned = tune(modules, schedule, loss, cut, lambda i: loss(cut + i), held)
        new = {name: m.stored() for name, m in changed_scales(modules).items()}
        norms = {name: m.stored() for name, m in modules.items() if isinstance(m, ScaledNorm)}
    return TunedBlock(new, norms, tuned)
