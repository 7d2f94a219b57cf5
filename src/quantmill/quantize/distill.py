"""`--distill`: scales, norms, codes of a whole quantised model, trained on the original's token distribution."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from quantmill.quantize.arithmetic import tensor_cores
from quantmill.quantize.block_tuning import TunedBlock
from quantmill.quantize.presets import Schedule
from quantmill.quantize.scaled import ScaledNorm, norm_names, trainable
from quantmill.quantize.tuning import Tuned, changed_scales, kl_divergence, tune
from quantmill.types import IntLinear

CODE_BYTES = 20  # of a code in training: itself, its gradient, two moments, and one more while it is moved


def distill(
    student: nn.Module,
    original: nn.Module,
    linears: Mapping[str, IntLinear],
    blocks: Tensor,
    held_rows: int,
    schedules: Sequence[Schedule],
    max_codes: Mapping[str, int],
    batch: int = 8,
) -> TunedBlock:
    """Train on all rows of blocks (samples, seqlen) int64 but the last `held_rows`, judge on those.

    student and original: models with `.logits`, on one device; `student` carries the norms to start from and is
    left with the trained ones. Every schedule goes on where the one before was best; max_codes: the largest code
    of every linear.
    """
    cut = len(blocks) - held_rows
    fit, held = torch.split(blocks[:cut], batch), torch.split(blocks[cut:], batch)
    device = next(student.parameters()).device

    def loss(ids: Tensor) -> Tensor:
        ids = ids.to(device)
        with torch.no_grad():
            wanted = _logits(original, ids)
        return kl_divergence(_logits(student, ids), wanted)

    done = TunedBlock(dict(linears), {}, Tuned(0.0, 0.0, 0))
    for schedule in schedules:
        before = done
        done = _trained(student, before.linears, schedule, max_codes, loss, fit, held)
        for name, weight in done.norms.items():
            student.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
        if before.norms:
            steps = before.tuned.step + done.tuned.step
            done = replace(done, tuned=Tuned(before.tuned.before, done.tuned.after, steps))
    return done


def affordable(schedules: Sequence[Schedule], codes: int, free: int) -> tuple[tuple[Schedule, ...], str]:
    """The schedules that `free` bytes allow for so many codes, and a remark if that is not all of them."""
    need = CODE_BYTES * codes
    kept = tuple(s for s in schedules if not s.code_rate or need <= free)
    if len(kept) == len(schedules):
        return kept, ""
    return kept, f", codes not trained: {need / 1e9:.0f} GB asked, {free / 1e9:.0f} GB free"


def _trained(
    student: nn.Module,
    linears: Mapping[str, IntLinear],
    schedule: Schedule,
    max_codes: Mapping[str, int],
    loss: Callable[[Tensor], Tensor],
    fit: Sequence[Tensor],
    held: Sequence[Tensor],
) -> TunedBlock:
    codes = max_codes if schedule.code_rate else None
    with (
        torch.inference_mode(False),
        tensor_cores(),
        trainable(student, linears, norm_names(student), torch.float32, codes, schedule.lean) as modules,
    ):
        tuned = tune(modules, schedule, lambda i: loss(fit[i]), len(fit), lambda i: loss(held[i]), len(held))
        new = {name: m.stored() for name, m in changed_scales(modules).items()}
        norms = {name: m.stored() for name, m in modules.items() if isinstance(m, ScaledNorm)}
    return TunedBlock(new, norms, tuned)


def _logits(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(ids, use_cache=False).logits
    return logits
