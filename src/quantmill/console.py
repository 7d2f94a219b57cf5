"""What a person or a program sees of a command: data on stdout, progress and remarks on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

PLAIN_EVERY = 5.0  # seconds between progress lines where there is no terminal


@dataclass(frozen=True, slots=True)
class Console:
    """The sink of one command. With `as_json`, stdout carries one JSON document and nothing else."""

    as_json: bool = False
    mute: bool = False  # of several processes that do one job, one speaks

    def say(self, text: str = "") -> None:
        """A line of the answer; goes to stderr when stdout belongs to JSON."""
        if self.mute:
            return
        print(text, file=sys.stderr if self.as_json else sys.stdout, flush=True)

    def note(self, text: str) -> None:
        """A remark on what is going on."""
        if not self.mute:
            print(text, file=sys.stderr, flush=True)

    def document(self, data: Any) -> None:
        """The JSON document, if one was asked for."""
        if self.as_json and not self.mute:
            json.dump(data, sys.stdout, indent=2, ensure_ascii=False)
            print(flush=True)

    def stream(self, text: str) -> None:
        """A piece of generated text."""
        print(text, end="", file=sys.stderr if self.as_json else sys.stdout, flush=True)

    def ask(self, prompt: str) -> str:
        """A line that somebody types. Raises EOFError where there are no more."""
        if self.as_json:
            self.note(prompt)
        return input("" if self.as_json else prompt)

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Columns, aligned: the first to the left, the others to the right."""
        widths = [max(len(str(r[i])) for r in (head, *rows)) for i in range(len(head))]
        for row in (head, ["-" * w for w in widths], *rows):
            cells = [
                c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
            ]
            self.say("  ".join(cells).rstrip())


Advance = Callable[[int, str], None]


@contextmanager
def progress(label: str, total: int) -> Iterator[Advance]:
    """Yields advance(steps, remark): a bar on a terminal, a line every few seconds elsewhere."""
    if sys.stderr.isatty():
        with _bar() as bar:
            task = bar.add_task(label, total=total, remark="", rate="")
            yield lambda steps, remark: _move(bar, task, steps, remark)
    else:
        yield _Plain(label, total)


def _bar() -> Progress:
    from rich.console import Console as RichConsole
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    done = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
    )
    ahead = (TimeRemainingColumn(), TextColumn("left  {task.fields[remark]}"))
    return Progress(*done, *ahead, console=RichConsole(stderr=True))


def _move(bar: Progress, task: TaskID, steps: int, remark: str) -> None:
    speed = bar.tasks[task].speed
    bar.update(task, advance=steps, remark=remark, rate=f"{speed:.1f}/s" if speed else "")


class _Plain:
    """Progress for logs: how far, how fast, how long still."""

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total, self.done = label, total, 0
        self.began = self.spoke = time.monotonic()

    def __call__(self, steps: int, remark: str) -> None:
        self.done += steps
        now = time.monotonic()
        if now - self.spoke < PLAIN_EVERY and self.done < self.total:
            return
        self.spoke = now
        rate = self.done / max(1e-9, now - self.began)
        left = (self.total - self.done) / rate if rate else float("inf")
        line = f"{self.label} {self.done}/{self.total}  {rate:.1f}/s  {seconds(left)} left  {remark}"
        print(line.rstrip(), file=sys.stderr, flush=True)


def gigabytes(size: float) -> str:
    """Bytes for people: 4.16 GB, 98.4 MB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}" if unit == "GB" else f"{size / scale:.1f} {unit}"
    return f"{size:.0f} B"


def seconds(value: float) -> str:
    """Seconds for people: 42 s, 3 min 5 s, 2 h 10 min."""
    if value != value or value == float("inf"):
        return "?"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
