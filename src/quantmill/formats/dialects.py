"""Quantisation configs of other methods -> GPTQ's keys, and what differs from module to module. No tensors.

    gptq                  itself                                    tensors as docs/formats.md says
    awq                   GEMM layout                               formats/awq.py
    compressed-tensors    pack-quantized                            formats/compressed.py
    auto-round            packed as GPTQ or as AWQ                  what its packing_format names

Per module: GPTQModel's `dynamic` (regular expressions, "-:" leaves a module alone, "+:" or nothing changes
its parameters, the first that matches counts) and AutoRound's `extra_config` (full names).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import StrEnum

from quantmill.errors import BadCheckpoint, UnsupportedModel
from quantmill.types import Json


class Layout(StrEnum):
    """How a quantised linear's tensors lie in the file."""

    GPTQ = "gptq"
    AWQ = "awq"
    COMPRESSED = "compressed-tensors"


# What a rule may set that bears on the bytes of a module.
PARAMETERS = ("bits", "group_size", "sym", "desc_act")


def method(quant: Json) -> str:
    """The method that a config names; old GPTQ configs name none."""
    found = quant.get("quant_method") or quant.get("method") or "gptq"
    return found if isinstance(found, str) else str(found)


def layout_of(quant: Json) -> Layout:
    """How the tensors lie. Raises UnsupportedModel for what is not read."""
    return _dialect(quant)[0](quant)


def as_gptq(quant: Json) -> Json:
    """The same parameters under GPTQ's keys. Raises UnsupportedModel for what is not read."""
    return _dialect(quant)[1](quant)


def module_keys(quant: Json, module: str) -> Json:
    """What `as_gptq(quant)` says of one module: the common keys with those of the rule that matches it."""
    common = as_gptq(quant)
    changed = _extra(common, module) | _dynamic(common, module)
    return common | {k: changed[k] for k in PARAMETERS if changed.get(k) is not None}


def is_mixed(quant: Json) -> bool:
    """Whether some module's parameters differ from the common ones."""
    rules = [rule for key, rule in _rules(quant) if not key.startswith("-:")]
    rules += list((quant.get("extra_config") or {}).values())
    return any(k in PARAMETERS and v != quant.get(k) for rule in rules for k, v in (rule or {}).items())


def _rules(quant: Json) -> list[tuple[str, Json]]:
    rules = quant.get("dynamic") or {}
    if not isinstance(rules, dict):
        raise BadCheckpoint("dynamic is no JSON object: correct the quantisation config")
    return list(rules.items())


def _dynamic(quant: Json, module: str) -> Json:
    for pattern, rule in _rules(quant):
        try:
            if re.match(pattern.removeprefix("+:").removeprefix("-:"), module):
                return rule or {}
        except re.error:
            raise BadCheckpoint(f"dynamic has {pattern!r}, which is no regular expression") from None
    return {}


def _extra(quant: Json, module: str) -> Json:
    rules = quant.get("extra_config") or {}
    found = rules.get(module) if isinstance(rules, dict) else None
    return found if isinstance(found, dict) else {}


def _gptq_layout(quant: Json) -> Layout:
    return Layout.GPTQ


def _gptq(quant: Json) -> Json:
    return quant


def _awq_layout(quant: Json) -> Layout:
    version = str(quant.get("version") or quant.get("format") or "gemm").lower()
    if version != "gemm":
        raise UnsupportedModel(
            f"AWQ version is {version!r}; quantmill reads 'gemm': give such a repository, or a GPTQ one"
        )
    return Layout.AWQ


def _awq(quant: Json) -> Json:
    _awq_layout(quant)
    size = next((quant[k] for k in ("group_size", "q_group_size") if k in quant), 128)
    return {
        "quant_method": "gptq",
        "bits": quant.get("bits") or quant.get("w_bit") or 4,
        "group_size": size,
        "desc_act": False,
        "sym": not quant.get("zero_point", True),
        "checkpoint_format": "gptq_v2",
        **{k: quant[k] for k in ("meta", "damp_percent") if k in quant},
    }


def _compressed_layout(quant: Json) -> Layout:
    packing = quant.get("format")
    if packing != "pack-quantized":
        raise UnsupportedModel(
            f"compressed-tensors format is {packing!r}; quantmill reads 'pack-quantized': give such a repository"
        )
    return Layout.COMPRESSED


def _compressed(quant: Json) -> Json:
    _compressed_layout(quant)
    groups = list((quant.get("config_groups") or {}).values())
    weights = [g.get("weights") or {} for g in groups if isinstance(g, dict)]
    if len(weights) != 1 or weights[0].get("type", "int") != "int":
        raise UnsupportedModel(
            f"compressed-tensors has {len(weights)} config_groups; quantmill reads one group of integer weights"
        )
    keys = weights[0]
    ordered = keys.get("actorder")
    return {
        "quant_method": "gptq",
        "bits": keys.get("num_bits"),
        "group_size": -1 if keys.get("strategy") == "channel" else keys.get("group_size"),
        "desc_act": ordered is not None,
        "static_groups": ordered not in (None, "group", "dynamic"),
        "sym": bool(keys.get("symmetric", True)),
        "checkpoint_format": "gptq_v2",
    }


def _auto_round_layout(quant: Json) -> Layout:
    packing = str(quant.get("packing_format") or quant.get("backend") or "")
    if "awq" in packing:
        return Layout.AWQ
    if "gptq" in packing:
        return Layout.GPTQ
    raise UnsupportedModel(
        f"AutoRound packed this as {packing or 'its own format'!r}; quantmill reads its GPTQ and AWQ packings"
    )


def _auto_round(quant: Json) -> Json:
    if _auto_round_layout(quant) is Layout.AWQ:
        return _awq(quant | {"version": "gemm", "zero_point": not quant.get("sym", True)})
    kept = {k: v for k, v in quant.items() if k not in ("quant_method", "packing_format", "backend")}
    return {**kept, "quant_method": "gptq", "desc_act": quant.get("desc_act", False)}


_Reader = tuple[Callable[[Json], Layout], Callable[[Json], Json]]
_DIALECTS: dict[str, _Reader] = {
    "gptq": (_gptq_layout, _gptq),
    "awq": (_awq_layout, _awq),
    "compressed-tensors": (_compressed_layout, _compressed),
    "auto-round": (_auto_round_layout, _auto_round),
    "intel/auto-round": (_auto_round_layout, _auto_round),
}


def _dialect(quant: Json) -> _Reader:
    name = method(quant)
    if name not in _DIALECTS:
        known = ", ".join(list(_DIALECTS)[:4])
        raise UnsupportedModel(
            f"quant_method is {name!r}; quantmill reads {known} folders: give a GPTQ repository"
        )
    return _DIALECTS[name]
