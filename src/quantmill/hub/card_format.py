"""Values and tables as the reader of a model card wants them. Knows no reports and no sections."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from quantmill.portable import public_command, public_name
from quantmill.types import EvalReport

__all__ = [
    "NOT_MEASURED",
    "NOT_RECORDED",
    "code",
    "duration",
    "kl_with_interval",
    "markdown_table",
    "or_missing",
    "percent",
    "public_command",
    "public_name",
    "size",
]

NOT_MEASURED = "not measured"
NOT_RECORDED = "not recorded"


def or_missing(value: object | None, missing: str = NOT_RECORDED) -> str:
    """A value as the card shows it; `missing` for None."""
    return missing if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def size(count: int) -> str:
    """Bytes in decimal units, as hubs and disks are sold."""
    if count >= 1e9:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def percent(fraction: float) -> str:
    """A fraction of 1 as a percentage with one digit."""
    return f"{100 * fraction:.1f} %"


def duration(seconds: float) -> str:
    """1 h 05 min, 3 min 20 s, 7.5 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min {rest:02} s"


def kl_with_interval(report: EvalReport) -> str:
    """Mean KL with its 95 % interval, as far as they were measured."""
    if report.mean_kl is None:
        return NOT_MEASURED
    if report.mean_kl_ci is None:
        return f"{report.mean_kl:.3g}"
    low, high = report.mean_kl_ci
    return f"{report.mean_kl:.3g} ({low:.3g} to {high:.3g})"


def code(names: Iterable[str]) -> str:
    """Names in code type, with commas."""
    return ", ".join(f"`{name}`" for name in names)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A pipe table; the first column to the left, the others centred."""
    lines = [list(head), [":--", *[":-:"] * (len(head) - 1)], *(list(map(_cell, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
