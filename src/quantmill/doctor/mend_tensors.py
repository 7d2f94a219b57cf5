"""Mends of tensors, all of them exact: zeros stored in both ways, a missing g_idx, groups numbered out of order.

An act-order module needs a gather because its g_idx is not k // G. Where the columns of every group do lie together
and only the groups are numbered in another order, its scales and zeros are put in the order of the columns, and
the gather is gone. Where columns of a group lie apart it stays: the columns are outputs of other modules, or the
residual stream that all blocks share, and those would have to change with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from quantmill.checkpoint import Checkpoint, open_checkpoint
from quantmill.doctor.facts import Order, gather
from quantmill.doctor.lines import count_of
from quantmill.formats.dialects import Layout
from quantmill.formats.gptq import pack_words, probe_format, unpack_zeros
from quantmill.types import ActOrder, CheckpointFormat, QuantConfig
from quantmill.weights import save_tensors

if TYPE_CHECKING:
    from torch import Tensor

Changed = dict[str, "Tensor"]


def tensors(copy: Path, base: Path | None) -> Iterator[str]:
    """Rewrite the weight files if a module asks for it."""
    checkpoint = open_checkpoint(copy)
    if checkpoint.quant is None or checkpoint.layout is not Layout.GPTQ or not checkpoint.quantized_modules():
        return
    facts, config = gather(checkpoint), checkpoint.quant_config
    sound = [m for m in facts.modules if not m.faults]
    changed: Changed = {}
    formats = [m.zero_format for m in sound]
    common = max(set(formats), key=formats.count) if formats else None
    mixed = [m.name for m in sound if m.zero_format is not common]
    if config.sym and common is not None:
        for name in mixed:
            changed |= _restored(checkpoint, config, name, common)
    missing = [m.name for m in sound if m.order is Order.MISSING and config.act_order is not ActOrder.GROUPED]
    for name in missing:
        changed[f"{name}.g_idx"] = _sequential(checkpoint.module_size(name)[0], config)
    ordered = [m.name for m in sound if m.order is Order.PERMUTED]
    found = {name: new for name in ordered if (new := _renumbered(checkpoint, config, name))}
    for new in found.values():
        changed |= new
    if not changed:
        return
    _rewrite(copy, checkpoint, changed)
    if mixed:
        yield f"weights: zeros of {count_of(mixed)} stored as {common}, as those of the others are"
    if missing:
        yield f"weights: g_idx of {count_of(missing)} written, which was k // G and left out"
    if found:
        rest = len(ordered) - len(found)
        yield f"weights: groups of {count_of(found)} put in the order of columns, so no gather is needed" + (
            f"; {rest} others have columns of one group apart and keep theirs" if rest else ""
        )


def _rewrite(copy: Path, checkpoint: Checkpoint, changed: Changed) -> None:
    """All tensors again, the changed ones changed; files of the copy are replaced, never written into."""
    names = [*checkpoint.tensors, *(n for n in changed if n not in checkpoint.tensors)]
    save_tensors(copy, ((n, changed[n] if n in changed else checkpoint.load(n)) for n in names))


def _restored(checkpoint: Checkpoint, config: QuantConfig, name: str, wanted: CheckpointFormat) -> Changed:
    """A symmetric module's zeros, stored in the way that is wanted."""
    qzeros = checkpoint.load(f"{name}.qzeros")
    out_features = checkpoint.module_size(name)[1]
    found = probe_format(qzeros, config.bits, True, config.zero_format)
    zeros = unpack_zeros(qzeros, config.bits, out_features, found)
    stored = zeros - 1 if wanted is CheckpointFormat.GPTQ else zeros
    return {f"{name}.qzeros": pack_words(stored, config.bits).T.contiguous()}


def _renumbered(checkpoint: Checkpoint, config: QuantConfig, name: str) -> Changed | None:
    """Scales and zeros in the order of the columns, None where columns of a group lie apart."""
    g_idx = checkpoint.load(f"{name}.g_idx").long()
    sequential = _sequential(len(g_idx), config).long()
    first = g_idx[:: config.effective_group(len(g_idx))]  # the group of each run of columns
    if not bool((first[sequential] == g_idx).all()):
        return None
    return {
        f"{name}.g_idx": sequential.int(),
        f"{name}.scales": checkpoint.load(f"{name}.scales")[first].contiguous(),
        f"{name}.qzeros": checkpoint.load(f"{name}.qzeros")[first].contiguous(),
    }


def _sequential(in_features: int, config: QuantConfig) -> Tensor:
    """k // G (K,) int32."""
    import torch

    return torch.arange(in_features, dtype=torch.int32) // config.effective_group(in_features)
