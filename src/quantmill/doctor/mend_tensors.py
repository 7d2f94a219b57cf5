"""Mends of tensors, all of them exact: zeros stored in both ways, a missing g_idx, groups numbered out of order.

An act-order module needs a gather because its g_idx is not k // G. Where the columns of every group do lie together
and only the groups are numbered in another order, its scales and zeros are put in the order of the columns, and
the gather is gone. Where columns of a group lie apart, mend_order.py knows when another module can bring them
together.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from quantmill.checkpoint import Checkpoint, open_checkpoint
from quantmill.doctor.facts import Order, gather
from quantmill.doctor.lines import count_of
from quantmill.doctor.mend_order import Edits, move_orders
from quantmill.formats.dialects import Layout
from quantmill.formats.gptq import pack_words, probe_format, unpack_zeros
from quantmill.types import ActOrder, CheckpointFormat, QuantConfig
from quantmill.weights import save_tensors

if TYPE_CHECKING:
    from torch import Tensor


def tensors(copy: Path, base: Path | None) -> Iterator[str]:
    """Rewrite the weight files if a module asks for it."""
    checkpoint = open_checkpoint(copy)
    if checkpoint.quant is None or checkpoint.layout is not Layout.GPTQ or not checkpoint.quantized_modules():
        return
    facts, config = gather(checkpoint), checkpoint.quant_config
    sound = [m for m in facts.modules if not m.faults]
    edits = Edits(checkpoint)
    formats = [m.zero_format for m in sound]
    common = max(set(formats), key=formats.count) if formats else None
    mixed = [m.name for m in sound if m.zero_format is not common] if config.sym else []
    for name in mixed:
        edits.put(f"{name}.qzeros", _restored(checkpoint, name, common or config.zero_format))
    missing = [m.name for m in sound if m.order is Order.MISSING and config.act_order is not ActOrder.GROUPED]
    for name in missing:
        module = checkpoint.module_config(name)
        edits.put(f"{name}.g_idx", _sequential(checkpoint.module_size(name)[0], module))
    ordered = [m.name for m in sound if m.order is Order.PERMUTED]
    renumbered = [name for name in ordered if _renumber(edits, name)]
    moved = list(move_orders(edits, (name for name in ordered if name not in renumbered)))
    if not edits.made:
        return
    _rewrite(copy, edits)
    if mixed:
        yield f"weights: zeros of {count_of(mixed)} stored as {common}, as those of the others are"
    if missing:
        yield f"weights: g_idx of {count_of(missing)} written, which was k // G and left out"
    if renumbered:
        yield f"weights: groups of {count_of(renumbered)} put in the order of columns, so no gather is needed"
    if moved:
        yield (
            f"weights: the order of inputs of {count_of(moved)} ({_kinds(moved)}) moved into the rows that make "
            "them, so no gather is needed"
        )
    rest = [name for name in ordered if name not in renumbered and name not in moved]
    if rest:
        yield (
            f"weights: {count_of(rest)} ({_kinds(rest)}) keep their gather: their inputs are the residual "
            "stream, or heads that do not share one order"
        )


def _kinds(modules: list[str]) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in modules}))


def _rewrite(copy: Path, edits: Edits) -> None:
    """All tensors again, the changed ones changed; files of the copy are replaced, never written into."""
    names = [*edits.checkpoint.tensors, *(n for n in edits.made if n not in edits.checkpoint.tensors)]
    save_tensors(copy, ((n, edits.load(n)) for n in names))


def _restored(checkpoint: Checkpoint, name: str, wanted: CheckpointFormat) -> Tensor:
    """A symmetric module's qzeros, stored in the way that is wanted."""
    config = checkpoint.module_config(name)
    qzeros = checkpoint.load(f"{name}.qzeros")
    out_features = checkpoint.module_size(name)[1]
    found = probe_format(qzeros, config.bits, True, config.zero_format)
    zeros = unpack_zeros(qzeros, config.bits, out_features, found)
    stored = zeros - 1 if wanted is CheckpointFormat.GPTQ else zeros
    return pack_words(stored, config.bits).T.contiguous()


def _renumber(edits: Edits, name: str) -> bool:
    """Scales and zeros in the order of the columns. False where columns of a group lie apart."""
    config = edits.checkpoint.module_config(name)
    g_idx = edits.load(f"{name}.g_idx").long()
    sequential = _sequential(len(g_idx), config).long()
    first = g_idx[:: config.effective_group(len(g_idx))]  # the group of each run of columns
    if not bool((first[sequential] == g_idx).all()):
        return False
    edits.put(f"{name}.g_idx", sequential.int())
    for suffix in ("scales", "qzeros"):
        edits.then(f"{name}.{suffix}", lambda tensor: tensor[first].contiguous())
    return True


def _sequential(in_features: int, config: QuantConfig) -> Tensor:
    """k // G (K,) int32."""
    import torch

    return torch.arange(in_features, dtype=torch.int32) // config.effective_group(in_features)
