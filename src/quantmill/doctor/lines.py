"""How findings name what they are about, so that two hundred modules with one fault make one line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized

from quantmill.types import Finding, Level

NAMED = 3  # of many names, the ones that are spelled out


def ok(where: str, message: str) -> Finding:
    """A rule that holds."""
    return Finding(Level.OK, where, message)


def warning(where: str, message: str) -> Finding:
    """Something that some readers stumble over."""
    return Finding(Level.WARNING, where, message)


def error(where: str, message: str) -> Finding:
    """Something that makes the folder unreadable, or read wrongly."""
    return Finding(Level.ERROR, where, message)


def grouped(level: Level, pairs: Iterable[tuple[str, str]]) -> Iterator[Finding]:
    """One finding per message, naming the modules that share it."""
    by_message: dict[str, list[str]] = {}
    for name, message in pairs:
        by_message.setdefault(message, []).append(name)
    for message, names in by_message.items():
        yield Finding(level, some(names), message)


def some(names: Iterable[str]) -> str:
    """The names, or their number and the first few."""
    listed = list(names)
    if len(listed) <= NAMED:
        return ", ".join(listed)
    return f"{len(listed)}, first {', '.join(listed[:NAMED])}"


def count_of(modules: Sized) -> str:
    """How many modules, in words."""
    return "1 module" if len(modules) == 1 else f"{len(modules)} modules"
