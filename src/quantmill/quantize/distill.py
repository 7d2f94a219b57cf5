"""`--distill`: scales and norms of a whole quantised model, trained on the original's next-token distribution."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quantmill.quantize.block_tuning import TunedBlock
from quantmill.quantize.presets import Schedule
from quantmill.quantize.scaled import ScaledNorm, norm_names, trainable
from quantmill.quantize.tuning import changed_scales, kl_divergence, tune
from quantmill.types import IntLinear


def distill(
    student: nn.Module,
    original: nn.Module,
    linears: Mapping[str, IntLinear],
    blocks: Tensor,
    held_rows: int,
    schedule: Schedule,
    batch: int = 8,
    dtype: torch.dtype = torch.float32,
) -> TunedBlock:
    """Train on all rows of blocks (samples, seqlen) int64 but the last `held_rows`, judge on those.

    student and original: models with `.logits`, on one device; `student` carries the norms to start from.
    """
    cut = len(blocks) - held_rows
    fit, held = torch.split(blocks[:cut], batch), torch.split(blocks[cut:], batch)
    device = next(student.parameters()).device
    with torch.inference_mode(False), trainable(student, linears, norm_names(student), dtype) as modules:

        def loss(ids: Tensor) -> Tensor:
            ids = ids.to(device)
            with torch.no_grad():
                wanted = _logits(original, ids)
            return kl_divergence(_logits(student, ids), wanted)

        tuned = tune(modules, schedule, lambda i: loss(fit[i]), len(fit), lambda i: loss(held[i]), len(held))
        new = {name: m.stored() for name, m in changed_scales(modules).items()}
        norms = {name: m.stored() for name, m in modules.items() if isinstance(m, ScaledNorm)}
    return TunedBlock(new, norms, tuned)


def _logits(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(ids, use_cache=False).logits
    return logits
