"""The parts of a model card that are computed: tables, verdicts, recipes. Facts in, short strings out.

Every number is one that a report holds or that follows from one by a stated rule; what is missing is called
"not measured" or "not recorded". Knows no files and not how the page is laid out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol

from quantmill.hub.card_advice import marks
from quantmill.hub.card_facts import BranchFacts, Making
from quantmill.hub.card_format import (
    NOT_MEASURED,
    NOT_RECORDED,
    code,
    duration,
    kl_with_interval,
    markdown_table,
    or_missing,
    percent,
    public_command,
    public_name,
    size,
)
from quantmill.types import ActOrder, CheckpointFormat, EvalReport, ModuleReport

# Provided files.


def _with_report(show: Callable[[EvalReport], str]) -> Callable[[BranchFacts], str]:
    return lambda branch: show(branch.measured) if branch.measured else NOT_MEASURED


def _top1(report: EvalReport) -> str:
    return NOT_MEASURED if report.top1_agreement is None else percent(report.top1_agreement)


def _dataset(branch: BranchFacts) -> str:
    dataset = branch.calibration.dataset
    return public_name(dataset) if dataset else NOT_RECORDED


ACT_ORDER = {ActOrder.NONE: "No", ActOrder.STATIC: "Yes", ActOrder.GROUPED: "Yes, grouped"}


def _bits(branch: BranchFacts) -> str:
    """One number, or how many linears have which, chosen by how much each matters (`dynamic` in the config)."""
    mixed = branch.modules_by_bits
    return ", ".join(f"{bits} ({count} linears)" for bits, count in mixed.items()) or str(branch.config.bits)


FILE_COLUMNS: dict[str, Callable[[BranchFacts], str]] = {
    "Branch": lambda b: f"`{b.name}`",
    "Bits": lambda b: _bits(b),
    "GS": lambda b: "None" if b.config.group_size == -1 else str(b.config.group_size),
    "Act Order": lambda b: ACT_ORDER[b.config.act_order],
    "Damp %": lambda b: or_missing(b.damp_percent),
    "{method} Dataset": _dataset,
    "Seq Len": lambda b: or_missing(b.calibration.seqlen),
    "Size": lambda b: size(b.size_bytes),
    "ExLlama": lambda b: "Yes" if reads(b, "exllamav2") else "No",
    "Bits per weight": lambda b: or_missing(b.bits_per_weight and round(b.bits_per_weight, 2)),
    "Perplexity": _with_report(lambda r: f"{r.perplexity:.3f}"),
    "Mean KL": _with_report(kl_with_interval),
    "Top-1": _with_report(_top1),
}


def provided_files(branches: Sequence[BranchFacts], method: str = "GPTQ") -> str:
    """The table of files, a row per branch."""
    columns = {name.format(method=method): show for name, show in FILE_COLUMNS.items()}
    return _table({**columns, "Desc": lambda b: _description(b, branches)}, branches)


def _description(branch: BranchFacts, branches: Sequence[BranchFacts]) -> str:
    """A row in words: its parameters, and what sets it apart."""
    size_of = branch.config.group_size
    group = "one scale per row" if size_of == -1 else f"groups of {size_of}"
    words = [f"{_bits(branch)} bits", group, _ORDER_WORDS[branch.config.act_order], *marks(branch, branches)]
    return ", ".join(words)


_ORDER_WORDS = {
    ActOrder.NONE: "no act order",
    ActOrder.STATIC: "act order",
    ActOrder.GROUPED: "act order in groups of its own",
}


def _table(columns: dict[str, Callable[[BranchFacts], str]], branches: Iterable[BranchFacts]) -> str:
    return markdown_table(list(columns), [[show(b) for show in columns.values()] for b in branches])


# Who reads it.


def _vllm(branch: BranchFacts) -> str:
    config = branch.config
    if any(bits not in (4, 8) for bits in branch.all_bits):
        return "takes 4 and 8 bits"
    if not config.sym:
        return "takes symmetric files only"
    if config.group_size not in (-1, 32, 64, 128):
        return "takes group sizes 32, 64, 128 and none"
    if config.act_order is ActOrder.GROUPED:
        return "follows no grouped act order (g_idx)"
    return "yes"


def _exllama(branch: BranchFacts) -> str:
    if branch.all_bits != (4,):
        return "takes 4 bits"
    if branch.config.zero_format is not CheckpointFormat.GPTQ:
        return "takes the v1 format only"
    if any(k % 32 or n % 32 for k, n in branch.shapes):
        return "needs every dimension to be a multiple of 32"
    return "yes"


def _any(branch: BranchFacts) -> str:
    return "yes"


LOADER_NAMES = {
    "transformers+quantmill": "Transformers with quantmill",
    "vllm": "vLLM",
    "gptqmodel": "GPTQModel",
    "exllamav2": "ExLlamaV2",
}
# What each program is known to take, for branches that `quantmill check` has not looked at.
GENERAL_VERDICTS = {
    "transformers+quantmill": _any,
    "vllm": _vllm,
    "gptqmodel": _any,
    "exllamav2": _exllama,
}


def verdicts(branch: BranchFacts) -> dict[str, str]:
    """Loader -> "yes" or the reason why not: as checked, else by the general rules."""
    general = {loader: rule(branch) for loader, rule in GENERAL_VERDICTS.items()}
    return dict(branch.loaders) if branch.loaders else general


def reads(branch: BranchFacts, loader: str) -> bool:
    """Whether a loader reads this branch's folder, by its verdict."""
    return verdicts(branch).get(loader, "").lower().startswith("yes")


def loader_lines(branches: Sequence[BranchFacts]) -> tuple[str, ...]:
    """One line per loader: which branches it reads, and why not the others."""
    loaders = dict.fromkeys(loader for b in branches for loader in verdicts(b))
    return tuple(_loader_line(loader, branches) for loader in loaders)


def _loader_line(loader: str, branches: Sequence[BranchFacts]) -> str:
    taken = [b.name for b in branches if reads(b, loader)]
    refused: dict[str, list[str]] = {}
    for branch in branches:
        if branch.name not in taken:
            refused.setdefault(verdicts(branch).get(loader, "unknown"), []).append(branch.name)
    every = "every branch" if len(branches) > 1 else "yes"
    said = every if not refused else code(taken) if taken else "no branch"
    reasons = "".join(f"; not {code(names)}: {reason}" for reason, names in refused.items())
    return f"**{LOADER_NAMES.get(loader, loader)}**: {said}{reasons}."


# How it was made.


@dataclass(frozen=True, slots=True)
class Recipe:
    """One way of making, and the branches that were made so."""

    branches: tuple[str, ...]
    rows: tuple[tuple[str, str], ...]
    command: str | None


class Recorded(Protocol):
    """A branch, or a file, with the record of its making."""

    @property
    def name(self) -> str: ...
    @property
    def making(self) -> Making | None: ...


def recipes(branches: Sequence[Recorded]) -> tuple[Recipe, ...]:
    """The runs that made the branches; those that differ only in time and outcome are one."""
    grouped: dict[Making, list[str]] = {}
    for branch in branches:
        if branch.making:
            same = dataclasses.replace(branch.making, seconds=None, peak_ram_bytes=None, modules=())
            grouped.setdefault(same, []).append(branch.name)
    return tuple(_recipe(making, tuple(names)) for making, names in grouped.items())


def _recipe(making: Making, branches: tuple[str, ...]) -> Recipe:
    data = making.calibration
    versions = ", ".join(f"{name} {version}" for name, version in making.versions)
    rows = (
        (
            "Made with",
            f"quantmill {or_missing(making.quantmill)}; {versions or 'other versions not recorded'}",
        ),
        ("Preset", or_missing(making.preset)),
        ("Original", (making.source.hub_id or making.source.name) if making.source else NOT_RECORDED),
        ("Calibration data", public_name(data.dataset) if data.dataset else NOT_RECORDED),
        ("Samples × sequence length", f"{or_missing(data.samples)} × {or_missing(data.seqlen)} tokens"),
        ("Tokens", or_missing(data.tokens)),
        ("Documents read / left out", f"{or_missing(data.documents)} / {or_missing(data.dropped)}"),
        ("Seed", or_missing(data.seed)),
        ("SHA-256 of the token ids", f"`{data.fingerprint}`" if data.fingerprint else NOT_RECORDED),
    )
    return Recipe(branches, rows, public_command(making.command) if making.command else None)


def _modules(branch: BranchFacts) -> tuple[ModuleReport, ...]:
    return branch.making.modules if branch.making else ()


def _largest(branch: BranchFacts) -> ModuleReport:
    return max(_modules(branch), key=lambda m: m.loss)


def _seconds(branch: BranchFacts) -> str:
    seconds = branch.making.seconds if branch.making else None
    return duration(seconds) if seconds is not None else NOT_RECORDED


def _peak(branch: BranchFacts) -> str:
    peak = branch.making.peak_ram_bytes if branch.making else None
    return size(peak) if peak else NOT_RECORDED


LOSS_COLUMNS: dict[str, Callable[[BranchFacts], str]] = {
    "Branch": lambda b: f"`{b.name}`",
    "Linears": lambda b: str(len(_modules(b))),
    "Median loss": lambda b: f"{median(m.loss for m in _modules(b)):.3g}",
    "Largest loss": lambda b: f"{_largest(b).loss:.3g}",
    "in": lambda b: f"`{_largest(b).name}`",
    "Time": _seconds,
    "Peak memory": _peak,
}


def layer_losses(branches: Sequence[BranchFacts]) -> str | None:
    """A table of the losses per linear, or None where no branch has them."""
    recorded = [b for b in branches if _modules(b)]
    return _table(LOSS_COLUMNS, recorded) if recorded else None


def fallback_lines(branches: Sequence[BranchFacts]) -> tuple[str, ...]:
    """Every linear that is not what was asked for, by branch and reason, in words."""
    lines = []
    for branch in branches:
        grouped: dict[str, list[str]] = {}
        for module in _modules(branch):
            reason = _fallback(module, branch.damp_percent)
            if reason:
                grouped.setdefault(reason, []).append(module.name)
        lines += [f"`{branch.name}`, {reason}: {code(names)}" for reason, names in grouped.items()]
    return tuple(lines)


def _fallback(module: ModuleReport, asked: float | None) -> str | None:
    damped = asked is not None and module.damp_percent > asked * (1 + 1e-9)
    damping = f"damp {module.damp_percent:g} instead of {asked:g}" if damped else ""
    return ", ".join(part for part in (module.fallback, damping) if part) or None


# How it was measured.


def protocols(branches: Sequence[BranchFacts]) -> tuple[str, ...]:
    """One line per way of measuring that was used."""
    grouped: dict[str, list[str]] = {}
    for branch in branches:
        if branch.measured:
            grouped.setdefault(_protocol(branch.measured), []).append(branch.name)
    if len(grouped) == 1:
        return tuple(grouped)
    return tuple(f"{code(names)}: {text}" for text, names in grouped.items())


def _protocol(report: EvalReport) -> str:
    original = (
        f" The original's perplexity on the same tokens is {report.original_perplexity:.3f}."
        if report.original_perplexity is not None
        else " The original was not measured beside it."
    )
    how = report.protocol[:1].upper() + report.protocol[1:].rstrip(".")
    return (
        f"Text {public_name(report.text)} (SHA-256 `{report.text_sha256}`), {report.windows} windows of "
        f"{report.ctx} tokens, {report.tokens} tokens scored. {how}.{original}"
    )


def _value(value: float | None, show: Callable[[float], str] = "{:.3g}".format) -> str:
    return NOT_MEASURED if value is None else show(value)


TAIL_COLUMNS: dict[str, Callable[[BranchFacts], str]] = {
    "Branch": lambda b: f"`{b.name}`",
    "Median KL": _with_report(lambda r: _value(r.median_kl)),
    "99 % of tokens below": _with_report(lambda r: _value(r.p99_kl)),
    "99.9 % below": _with_report(lambda r: _value(r.p999_kl)),
    "Largest KL": _with_report(lambda r: _value(r.max_kl)),
    "RMS change of the true token's probability": _with_report(lambda r: _value(r.rms_delta_p, percent)),
}


def tails(branches: Sequence[BranchFacts]) -> str | None:
    """How the KL is spread over tokens, or None where no branch was compared with the original."""
    compared = [b for b in branches if b.measured and b.measured.mean_kl is not None]
    return _table(TAIL_COLUMNS, compared) if compared else None
