"""Who can read a folder: one row per loader, one function per reason to refuse. Works on facts alone.

What each loader takes is the last table of docs/formats.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from quantmill.doctor.facts import Facts, ModuleFacts, Order
from quantmill.formats.dialects import Layout, is_mixed
from quantmill.types import CheckpointFormat, Finding, Level, QuantConfig

VLLM_GROUPS = (-1, 32, 64, 128)
VLLM_KEYS = ("bits", "group_size", "desc_act", "sym")


@dataclass(frozen=True, slots=True)
class Folder:
    """What a verdict rests on."""

    config: QuantConfig
    mixed: bool  # parameters differ from module to module
    stated: frozenset[str]  # keys of the quantisation config
    modules: tuple[ModuleFacts, ...]
    damage: tuple[Finding, ...]  # errors of the tensors themselves
    errors: tuple[Finding, ...]  # those, and of what the JSON says of them

    def first(self, bad: Callable[[ModuleFacts], bool]) -> ModuleFacts | None:
        return next((m for m in self.modules if bad(m)), None)


Reason = Callable[[Folder], str | None]


def _one_set(folder: Folder) -> str | None:
    return "parameters differ from module to module, it reads one set" if folder.mixed else None


def _damage(folder: Folder) -> str | None:
    return _first(folder.damage)


def _errors(folder: Folder) -> str | None:
    return _first(folder.errors)


def _first(errors: tuple[Finding, ...]) -> str | None:
    return f"{errors[0].where}: {errors[0].message}" if errors else None


def _v1_only(folder: Folder) -> str | None:
    other = folder.first(lambda m: m.zero_format is not CheckpointFormat.GPTQ)
    return f"zeros are stored as {other.zero_format}, it reads gptq (v1)" if other else None


def _label_true(folder: Folder) -> str | None:
    """Loaders that trust the label read zeros off by one where it lies."""
    label = folder.config.zero_format
    other = folder.first(lambda m: m.zero_format is not label)
    return f"labelled {label}, but zeros are stored as {other.zero_format}" if other else None


def _bits(*known: int) -> Reason:
    def reason(folder: Folder) -> str | None:
        bits = folder.config.bits
        return None if bits in known else f"{bits} bits, it reads {' and '.join(map(str, known))}"

    return reason


def _symmetric(folder: Folder) -> str | None:
    return None if folder.config.sym else "asymmetric, it reads symmetric files"


def _vllm_groups(folder: Folder) -> str | None:
    size = folder.config.group_size
    return None if size in VLLM_GROUPS else f"group size {size}, it reads {', '.join(map(str, VLLM_GROUPS))}"


def _vllm_keys(folder: Folder) -> str | None:
    lacking = [k for k in VLLM_KEYS if k not in folder.stated]
    return f"the quantisation config lacks {', '.join(lacking)}, it has no defaults" if lacking else None


def _whole_groups(folder: Folder) -> str | None:
    """Its buffers hold K // G groups."""
    size = folder.config.group_size
    short = folder.first(lambda m: size != -1 and m.in_features % size != 0)
    return f"{short.name} has {short.in_features} inputs, no multiple of group size {size}" if short else None


def _vllm_order(folder: Folder) -> str | None:
    other = folder.first(lambda m: m.order not in (Order.SEQUENTIAL, Order.MISSING))
    return f"g_idx of {other.name} is {other.order}, which it ignores since September 2026" if other else None


def _multiples_of_32(folder: Folder) -> str | None:
    other = folder.first(lambda m: m.in_features % 32 != 0 or m.out_features % 32 != 0)
    if other is None:
        return None
    return f"{other.name} is {other.out_features} × {other.in_features}, it needs multiples of 32"


def _three_bits_in_32(folder: Folder) -> str | None:
    return _multiples_of_32(folder) if folder.config.bits == 3 else None


def _powers_of_two(folder: Folder) -> str | None:
    """ExLlamaV2 stores no group size: it takes the least power of two that times the groups covers K."""

    def differs(m: ModuleFacts) -> bool:
        guess = 1
        while guess * m.groups < m.in_features:
            guess *= 2
        return m.groups > 1 and guess != folder.config.group_size

    other = folder.first(differs)
    return (
        f"{other.name}: it would guess another group size than {folder.config.group_size}" if other else None
    )


def _even_groups(folder: Folder) -> str | None:
    other = folder.first(lambda m: m.order is Order.UNEVEN)
    return f"g_idx of {other.name} has groups of unequal sizes" if other else None


# Folders of the other layouts that are read: their own loaders are many, these are what we know of ours.
FOREIGN: dict[str, tuple[Reason, ...]] = {
    "transformers+quantmill": (_errors,),
    "vllm": (_damage,),
    "gptqmodel": (_damage,),
    "exllamav2": (lambda folder: "it reads GPTQ files and its own",),
}
READERS: dict[str, tuple[Reason, ...]] = {
    "transformers+quantmill": (_errors,),
    "vllm": (
        _damage,
        _bits(4, 8),
        _symmetric,
        _v1_only,
        _vllm_groups,
        _vllm_keys,
        _whole_groups,
        _vllm_order,
    ),
    "gptqmodel": (_damage, _label_true, _three_bits_in_32),
    "exllamav2": (
        _damage,
        _one_set,
        _bits(4),
        _v1_only,
        _multiples_of_32,
        _powers_of_two,
        _even_groups,
    ),
}


def verdicts(facts: Facts, of_tensors: list[Finding], of_papers: list[Finding]) -> dict[str, str]:
    """Per loader "yes", or the first reason why not. Damaged tensors put every loader off."""
    if not facts.quantized:
        return dict.fromkeys(READERS, "not a quantised model")
    if facts.config is None:
        return dict.fromkeys(READERS, facts.config_fault or "no quantisation config")
    damage = tuple(f for f in of_tensors if f.level is Level.ERROR)
    errors = (*damage, *(f for f in of_papers if f.level is Level.ERROR))
    quant = facts.checkpoint.quant or {}
    folder = Folder(facts.config, is_mixed(quant), frozenset(quant), facts.modules, damage, errors)
    table = READERS if facts.checkpoint.layout is Layout.GPTQ else FOREIGN
    return {name: _verdict(folder, reasons) for name, reasons in table.items()}


def _verdict(folder: Folder, reasons: Iterable[Reason]) -> str:
    return next((said for reason in reasons if (said := reason(folder))), "yes")
