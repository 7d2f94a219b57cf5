"""A parameter set <-> the JSON that GPTQ folders carry. Knows the keys of every era, no tensors and no files.

Written: what docs/formats.md lists, under every name a living reader looks for. Read: AutoGPTQ's
`quantize_config.json`, GPTQModel's, Optimum's and Transformers' `quantization_config`; through dialects.py
those of AWQ, compressed-tensors and AutoRound.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from quantmill import __version__
from quantmill.errors import BadCheckpoint, UnsupportedModel
from quantmill.formats.dialects import as_gptq, module_keys
from quantmill.types import BITS, ActOrder, CheckpointFormat, Json, QuantConfig

READABLE_FORMATS = tuple(str(f) for f in CheckpointFormat)


def config_to_json(
    config: QuantConfig,
    *,
    model_file_base_name: str = "model",
    lm_head: bool = False,
    meta: Json | None = None,
    dynamic: Sequence[tuple[str, QuantConfig]] = (),
) -> Json:
    """The `quantization_config` of `config.json`, which is also the whole of `quantize_config.json`.

    `meta` is what the maker wants to record (data set, hash, ...); quantizer name and version are added.
    `dynamic` names modules whose parameters differ; it is written as GPTQModel and vLLM read it.
    """
    static_groups = config.act_order is ActOrder.STATIC
    solver = {
        "damp_percent": config.damp_percent,
        "static_groups": static_groups,
        "true_sequential": config.true_sequential,
    }
    return {
        "quant_method": "gptq",
        "bits": config.bits,
        "group_size": config.group_size,
        "desc_act": config.desc_act,
        "sym": config.sym,
        "checkpoint_format": str(config.zero_format),
        "format": str(config.zero_format),  # GPTQModel and Optimum look here
        "lm_head": lm_head,
        **({"dynamic": _rules(dynamic)} if dynamic else {}),
        **solver,
        "act_group_aware": False,  # another reordering; Transformers supposes it unless told
        "model_file_base_name": model_file_base_name,
        "meta": {"quantizer": [f"quantmill:{__version__}"], **solver, **(meta or {})},
    }


def _rules(dynamic: Sequence[tuple[str, QuantConfig]]) -> Json:
    """A regular expression per module that differs -> the parameters that bear on its bytes."""
    return {
        f"+:^{re.escape(module)}$": {
            "bits": c.bits,
            "group_size": c.group_size,
            "sym": c.sym,
            "desc_act": c.desc_act,
        }
        for module, c in dynamic
    }


def config_from_json(quant: Json) -> QuantConfig:
    """The parameters of a folder that any tool wrote, with `checkpoint_format` always filled in.

    Raises UnsupportedModel for a method, a packing or a bit width that is not GPTQ's, BadCheckpoint for
    missing or senseless values. A senseless damp, which does not bear on the bytes, becomes the default.
    What differs from module to module is in `module_config`.
    """
    quant = as_gptq(quant)
    _refuse_other_packings(quant)
    meta = quant.get("meta")
    solver: Json = {
        **(meta if isinstance(meta, dict) else {}),
        **{k: v for k, v in quant.items() if v is not None},
    }
    defaults = QuantConfig()
    return QuantConfig(
        bits=_bits(quant),
        group_size=_group_size(quant),
        act_order=_act_order(_flag(quant, "desc_act", False), bool(solver.get("static_groups"))),
        sym=_flag(quant, "sym", defaults.sym),
        damp_percent=_damp(solver.get("damp_percent"), defaults.damp_percent),
        true_sequential=bool(solver.get("true_sequential", defaults.true_sequential)),
        checkpoint_format=_checkpoint_format(quant),
    )


def module_config(quant: Json, module: str) -> QuantConfig:
    """The parameters of one module of a folder. Raises as config_from_json does."""
    return config_from_json(module_keys(quant, module))


def _refuse_other_packings(quant: Json) -> None:
    if quant.get("is_marlin_format"):
        raise UnsupportedModel(
            "is_marlin_format is true: Marlin-packed weights are not GPTQ: give the GPTQ original"
        )
    if quant.get("pack_dtype", "int32") != "int32":
        raise UnsupportedModel(
            f"pack_dtype is {quant['pack_dtype']!r}; quantmill reads int32: quantise again"
        )


def _checkpoint_format(quant: Json) -> CheckpointFormat:
    label = quant.get("checkpoint_format") or quant.get("format") or CheckpointFormat.GPTQ
    if label not in READABLE_FORMATS:
        known = " and ".join(READABLE_FORMATS)
        raise UnsupportedModel(
            f"checkpoint_format is {label!r}; quantmill reads {known}: give a GPTQ repository"
        )
    return CheckpointFormat(label)


def _bits(quant: Json) -> int:
    bits = _first(quant, "bits", "w_bit", "wbits")
    if bits is None:
        raise BadCheckpoint("the quantisation config has no 'bits': add it, e.g. \"bits\": 4")
    if not _is_int(bits) or bits not in BITS:
        known = ", ".join(map(str, BITS))
        raise UnsupportedModel(
            f"bits is {bits!r}; quantmill reads {known}: give another branch or repository"
        )
    return int(bits)


def _group_size(quant: Json) -> int:
    known = [k for k in ("group_size", "q_group_size", "groupsize") if k in quant]
    if not known:
        raise BadCheckpoint("the quantisation config has no 'group_size': add it, e.g. \"group_size\": 128")
    size = -1 if quant[known[0]] is None else quant[known[0]]  # the cards' "None" is one group per row
    if not _is_int(size) or (size != -1 and (size < 8 or size % 8)):
        raise BadCheckpoint(
            f"group_size is {size!r}; it is -1 or a multiple of 8: correct the quantisation config"
        )
    return int(size)


def _act_order(desc_act: bool, static_groups: bool) -> ActOrder:
    if not desc_act:
        return ActOrder.NONE
    return ActOrder.STATIC if static_groups else ActOrder.GROUPED


def _flag(quant: Json, key: str, default: bool) -> bool:
    value = quant.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise BadCheckpoint(f"{key} is {value!r}; it is true or false: correct the quantisation config")
    return value


def _damp(value: object, default: float) -> float:
    if isinstance(value, int | float) and 0 < value < 1:
        return float(value)
    return default


def _first(quant: Json, *keys: str) -> object:
    return next((quant[k] for k in keys if quant.get(k) is not None), None)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
