"""One quantising run beside the server: a process of its own, followed through its events file.

A process, because a run takes all cores for long and is to be stopped at any moment without harm: what is done
stays in its work folder and `--resume` goes on from there.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantmill.errors import BadRequest
from quantmill.files import cache_root

LABELS = {"source": "Source", "out": "Output folder", "dataset": "Calibration text"}  # as the page names them
LAST_LINES = 12  # of its remarks that are shown
PATIENCE = 20  # seconds from asking it to stop to ending it


@dataclass(frozen=True, slots=True)
class Form:
    """What the user filled in."""

    source: str
    out: str
    variants: tuple[str, ...]
    dataset: str
    samples: int
    seqlen: int
    preset: str

    def arguments(self) -> list[str]:
        """For `quantmill quantize`. Raises BadRequest for what is missing."""
        self.check(LABELS)
        chosen = [a for v in self.variants for a in ("--variant", v)]
        drawn = ["--dataset", self.dataset.strip(), "--samples", str(self.samples)]
        kept = ["--seqlen", str(self.seqlen), "--preset", self.preset]
        return [self.source.strip(), "--out", self.out.strip(), *chosen, *drawn, *kept]

    def check(self, fields: Iterable[str]) -> None:
        """Raises BadRequest where one of the fields, or the variants, cannot be used."""
        for name in fields:
            value = getattr(self, name).strip()
            if not value:
                raise BadRequest(f"{LABELS[name]} is empty: fill it in")
            if value.startswith("-"):  # would be read as an option of the command
                raise BadRequest(f"{LABELS[name]} is {value!r}: it cannot begin with a dash")
        if not self.variants:
            raise BadRequest("no variant is chosen: tick one, or type one such as 4bit-64g")


Loss = tuple[str, int, str, float]  # branch, block, kind of linear, relative loss


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is."""

    state: str  # idle, running, stopped, failed, finished
    done: int = 0
    total: int = 0
    losses: tuple[Loss, ...] = ()
    finished: tuple[tuple[str, str, int], ...] = ()  # branch, folder, bytes
    remarks: str = ""


class Run:
    """At most one run at a time."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = (folder or cache_root()) / "ui"
        self._process: subprocess.Popen[str] | None = None
        self._remarks: list[str] = []
        self._stopped = False
        self._form: Form | None = None  # what the last run was asked for
        self._earlier: tuple[Loss, ...] = ()  # of that run's blocks, where it was gone on with
        self._lock = threading.Lock()

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, form: Form, resume: bool = False) -> None:
        """Raises BadRequest where a run is on, or a field is missing."""
        arguments = form.arguments()
        with self._lock:
            if self.running:
                raise BadRequest("a run is on: stop it first")
            self._folder.mkdir(parents=True, exist_ok=True)
            self._earlier = self._losses(_read(self._events)) if resume and form == self._form else ()
            self._form = form
            self._events.unlink(missing_ok=True)
            command = [sys.executable, "-m", "quantmill.cli", "quantize", *arguments]
            command += ["--events", str(self._events), *(["--resume"] if resume else [])]
            self._remarks, self._stopped = [], False
            self._process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, stdin=subprocess.DEVNULL
            )
            threading.Thread(target=self._listen, args=(self._process,), daemon=True).start()

    def stop(self) -> None:
        """Ask the run to end; it is ended after PATIENCE seconds."""
        process = self._process
        if process is None or process.poll() is not None:
            return
        self._stopped = True
        process.send_signal(signal.SIGINT)
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def progress(self) -> Progress:
        """As it is now."""
        if self._process is None:
            return Progress("idle")
        events = _read(self._events)
        started = next((e for e in events if e["event"] == "started"), None)
        total = started["blocks"] * started["modules_per_block"] * len(started["branches"]) if started else 0
        solved = sum(e["event"] == "solved" for e in events)
        per_block = started["modules_per_block"] if started else 0
        again = sum(per_block for e in events if e["event"] == "block" and e["resumed"])
        finished = tuple(
            (e["branch"], e["folder"], e["size_bytes"]) for e in events if e["event"] == "finished"
        )
        remarks = "\n".join(self._remarks[-LAST_LINES:])
        return Progress(self._state(), solved + again, total, self._losses(events), finished, remarks)

    def _losses(self, events: Sequence[dict[str, Any]]) -> tuple[Loss, ...]:
        """Of what is not solved anew the losses that the run told before it was stopped."""
        told = [*self._earlier, *(_loss(e) for e in events if e["event"] == "solved")]
        return tuple({loss[:3]: loss for loss in told}.values())

    @property
    def _events(self) -> Path:
        return self._folder / "quantize-events.jsonl"

    def _state(self) -> str:
        code = self._process.poll() if self._process else None
        if code is None:
            return "running"
        return "stopped" if self._stopped else "failed" if code else "finished"

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                if line.strip():
                    self._remarks.append(line.rstrip())
                    del self._remarks[:-LAST_LINES]
        process.wait()


def _read(file: Path) -> list[dict[str, Any]]:
    """Whole lines only: the last one may be half written."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")[:-1]
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines]


def _loss(event: dict[str, Any]) -> Loss:
    parts: Sequence[str] = event["module"].split(".")
    block = next((int(p) for p in parts if p.isdigit()), 0)
    return event["branch"], block, parts[-1], float(event["loss"])
