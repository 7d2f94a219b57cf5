"""Parameter sets and their names: a QuantConfig <-> a branch, and what a user types after --variant.

A branch is called `gptq-{bits}bit-{group}g-actorder_{True|False}`, and `main` where the parameters are the
defaults. Names say nothing of damp, true-sequential or the zero-point format, nor of how act order was done:
True is static, unless a suffix says otherwise. Knows no folders: the configs in a folder are the truth, a
name is only a promise.
"""

from __future__ import annotations

import re
from typing import Any

from quantmill.errors import BadRequest
from quantmill.types import ActOrder, QuantConfig, Variant

MAIN = "main"
GROUPED = "-grouped"  # readers must follow g_idx
ASYMMETRIC = "-asym"

_OWN = re.compile(r"gptq-(\d+)bit-(-1|\d+)g-actorder_(True|False)(-grouped)?(-asym)?")

# Names made by other people, in lower case.
_OTHER_METHODS = re.compile(r"awq|gguf|ggml|exl\d|hqq|bnb|nf4|aqlm|eetq|fp8|bpw")
_BITS = re.compile(r"(?<![\d.])(\d+)[-_]?bits?(?![a-z])|(?<![a-z])(?:int|w)(\d+)(?=[-_.g]|$)")
_GROUP = re.compile(r"[-_.](-1|none|\d+)g(?![a-z\d])|g(?:s|roup[-_]?(?:size)?)?[-_]?(-1|none|\d+)(?![a-z\d])")
_ACT = re.compile(r"(no[-_.]?)?(?:act|desc[-_.]?act|act[-_.]?order)(?:[-_.]?(true|false))?(?![a-z])")
_ASYM = re.compile(r"asym|sym[-_.]?false")

# What may follow `4bit-128g` on the command line: the parameter that a word sets, and to what.
_WORDS: dict[str, tuple[str, Any]] = {
    "act": ("act_order", ActOrder.STATIC),
    "noact": ("act_order", ActOrder.NONE),
    "grouped": ("act_order", ActOrder.GROUPED),
    "sym": ("sym", True),
    "asym": ("sym", False),
}
_TYPED = re.compile(r"(\d+)bit-(-1|none|\d+)g((?:-[a-z]+)*)")


def branch_name(config: QuantConfig) -> str:
    """The branch (and folder) of this parameter set; damp, true-sequential and zero format do not show."""
    default = QuantConfig()
    distinct = ("bits", "group_size", "act_order", "sym")
    if all(getattr(config, key) == getattr(default, key) for key in distinct):
        return MAIN
    grouped = GROUPED if config.act_order is ActOrder.GROUPED else ""
    asymmetric = "" if config.sym else ASYMMETRIC
    return f"gptq-{config.bits}bit-{config.group_size}g-actorder_{config.desc_act}{grouped}{asymmetric}"


def parse_branch(name: str) -> QuantConfig | None:
    """The parameters that a branch name promises, None where it says too little (no bits or no group).

    Reads our own names and those of other makers (`gptq-8bit--1g-actorder_True`, `4bit-128g`,
    `w4g64-no-act-order`). What a name leaves open takes QuantConfig's default; `main` means the default set,
    as in the repositories made here.
    """
    if name == MAIN:
        return QuantConfig()
    own = _OWN.fullmatch(name)
    if own:
        bits, group, act, grouped, asymmetric = own.groups()
        if grouped and act == "False":
            return None
        order = ActOrder.GROUPED if grouped else ActOrder.STATIC if act == "True" else ActOrder.NONE
        return _config(bits, group, order, sym=not asymmetric)
    return _parse_foreign(name.lower())


def _parse_foreign(name: str) -> QuantConfig | None:
    bits, group, act = _BITS.search(name), _GROUP.search(name), _ACT.search(name)
    if _OTHER_METHODS.search(name) or not bits or not group:
        return None
    off = act is not None and (bool(act[1]) or act[2] == "false")
    order = ActOrder.NONE if off else QuantConfig().act_order
    return _config(bits[1] or bits[2], group[1] or group[2], order, sym=not _ASYM.search(name))


def _config(bits: str, group: str, order: ActOrder, sym: bool) -> QuantConfig | None:
    try:
        return QuantConfig(int(bits), -1 if group == "none" else int(group), order, sym)
    except BadRequest:  # a name may promise what no GPTQ file holds
        return None


def parse_variant(text: str) -> Variant:
    """What a user types: bits and group, then options in any order, or one of our branch names.

    `4bit-128g`, `8bit--1g`, `3bit-64g-noact`, `4bit-128g-grouped`, `4bit-32g-asym`, `main`.

    Raises BadRequest, with an example, for anything else and for words that contradict each other.
    """
    if text == MAIN or _OWN.fullmatch(text):
        config = parse_branch(text)
        if config:
            return Variant(branch_name(config), config)
    typed = _TYPED.fullmatch(text)
    if not typed:
        raise BadRequest(
            f"{text!r} is no variant; write bits, group and options, as in 4bit-128g or 3bit-64g-noact"
        )
    bits, group, rest = typed.groups()
    chosen = _options(text, rest.split("-")[1:])
    try:
        config = QuantConfig(int(bits), -1 if group == "none" else int(group), **chosen)
    except BadRequest as error:
        raise BadRequest(f"variant {text!r}: {error}, as in 4bit-128g") from None
    return Variant(branch_name(config), config)


def _options(text: str, words: list[str]) -> dict[str, Any]:
    """The parameters that the words after the group size set."""
    chosen: dict[str, Any] = {}
    for word in words:
        if word not in _WORDS:
            raise BadRequest(
                f"variant {text!r}: {word!r} is none of {', '.join(_WORDS)}; write for example 4bit-128g-asym"
            )
        key, value = _WORDS[word]
        if key in chosen:
            raise BadRequest(f"variant {text!r} sets {key} twice; write for example 4bit-128g-noact")
        chosen[key] = value
    return chosen


def _variants(*configs: QuantConfig) -> tuple[Variant, ...]:
    return tuple(Variant(branch_name(config), config) for config in configs)


# The four branches of the repository that the specification describes, with its damping; act order is a default.
CARD_GRID = _variants(
    *(QuantConfig(bits, group, damp_percent=0.1) for bits, group in ((4, 128), (4, 32), (8, 128), (8, 32)))
)
GRIDS = {"card": CARD_GRID}
