"""Mends of the two configs: what the tensors decide, labels, completeness, and that both say the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from quantmill.checkpoint import Checkpoint, open_checkpoint
from quantmill.doctor.facts import Order, gather
from quantmill.errors import BadCheckpoint, UnsupportedModel
from quantmill.files import read_json, write_json
from quantmill.formats.config import config_to_json
from quantmill.formats.dialects import Layout
from quantmill.types import ActOrder, Json

CONFIG, QUANTIZE_CONFIG = "config.json", "quantize_config.json"
LABEL_KEYS = ("checkpoint_format", "format")
DECISIVE = ("bits", "group_size")


def parameters(copy: Path, base: Path | None) -> Iterator[str]:
    """Bits and group size that the tensors' shapes fit, where the two configs differ or both are wrong."""
    checkpoint = open_checkpoint(copy)
    if checkpoint.layout is not Layout.GPTQ or not checkpoint.quantized_modules():
        return
    stated, other = checkpoint.quant or {}, _optional(copy / QUANTIZE_CONFIG) or {}
    if _fits(checkpoint, stated):
        return
    candidates = ({**other, **stated}, {**stated, **_only(other, DECISIVE)}, _from_shapes(checkpoint))
    right = next((quant for quant in candidates if quant and _fits(checkpoint, quant)), None)
    if right is None:
        return
    said = ", ".join(f"{k} {stated.get(k)} -> {right[k]}" for k in DECISIVE if k in right)
    write_json(copy / CONFIG, checkpoint.config | {"quantization_config": right})
    yield f"{CONFIG}: {said}, as the tensors' shapes say"


def _fits(checkpoint: Checkpoint, quant: Json) -> bool:
    """Whether every module has the shapes that these parameters ask for."""
    tried = replace(checkpoint, quant=quant)
    try:
        return not any(tried.module_faults(module) for module in tried.quantized_modules())
    except (BadCheckpoint, UnsupportedModel):
        return False


def _from_shapes(checkpoint: Checkpoint) -> Json | None:
    """Bits from qweight and g_idx, the group size from scales. None where there is no g_idx to tell K."""
    tensors, known = checkpoint.tensors, checkpoint.quant or {}
    for module in checkpoint.quantized_modules():
        held = [tensors.get(f"{module}.{suffix}") for suffix in ("qweight", "scales", "g_idx")]
        if any(info is None for info in held):
            continue
        words, groups, in_features = (info.shape[0] for info in held if info is not None)
        if groups > 1 and in_features % groups == 0:
            return {**known, "bits": 32 * words // in_features, "group_size": in_features // groups}
        if groups == 1:
            return {**known, "bits": 32 * words // in_features, "group_size": -1}
    return None


def labels(copy: Path, base: Path | None) -> Iterator[str]:
    """Both configs complete, equal, and true to zeros, group order and output head."""
    checkpoint = open_checkpoint(copy)
    if checkpoint.quant is None or checkpoint.layout is not Layout.GPTQ:
        return
    quant = true_config(checkpoint)
    wanted = {CONFIG: checkpoint.config | {"quantization_config": quant}, QUANTIZE_CONFIG: quant}
    for name, value in wanted.items():
        before = _optional(copy / name)
        if before != value:
            write_json(copy / name, value)
            stated = (before or {}).get("quantization_config") if name == CONFIG else before
            yield f"{name}: {_difference(stated or {}, quant) or 'written'}"


def true_config(checkpoint: Checkpoint) -> Json:
    """The stated keys, the missing ones, and what the tensors say of zeros, order and head.

    Raises BadCheckpoint where modules store zeros in both ways.
    """
    facts = gather(checkpoint)
    config, stated = checkpoint.quant_config, dict(checkpoint.quant or {})
    sound = [m for m in facts.modules if not m.faults]
    formats = {m.zero_format for m in sound}
    if len(formats) > 1:
        raise BadCheckpoint(
            f"{checkpoint.folder} mixes gptq and gptq_v2 zeros; no label is true: quantise again"
        )
    zero_format = next(iter(formats), None) or config.zero_format
    true = replace(config, checkpoint_format=zero_format)
    orders = {m.order for m in sound}
    if orders & {Order.PERMUTED, Order.UNEVEN}:
        true = replace(true, act_order=ActOrder.GROUPED)
    elif orders == {Order.SEQUENTIAL} and config.act_order is ActOrder.GROUPED:
        true = replace(true, act_order=ActOrder.STATIC)
    if any(m.odd_zeros for m in sound):
        true = replace(true, sym=False)
    head = "lm_head.qweight" in checkpoint.tensors
    written = config_to_json(true, lm_head=head)
    told = ("desc_act", "static_groups", "sym", "lm_head", "model_file_base_name", *LABEL_KEYS)
    kept = {k: v for k, v in stated.items() if v is not None and k not in told}
    return written | kept


def _difference(before: Json, after: Json) -> str:
    """The keys that changed, of those that people know."""
    changed = [k for k, v in after.items() if k not in ("meta", "format") and before.get(k) != v]
    return ", ".join(f"{k} is {after[k]}" for k in changed)


def _only(quant: Json, keys: tuple[str, ...]) -> Json:
    return {k: quant[k] for k in keys if quant.get(k) is not None}


def _optional(path: Path) -> Json | None:
    """None where there is no file, or one that is no JSON: it is written anew."""
    try:
        return read_json(path)
    except BadCheckpoint:
        return None
