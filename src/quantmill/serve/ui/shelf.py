"""The models that can be picked: those that the server was started with, and whole ones in the shared cache.

Reads what a folder says of itself. Knows no widget.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty, SimpleQueue

from quantmill.checkpoint import open_checkpoint
from quantmill.console import gigabytes
from quantmill.errors import BadRequest, QuantmillError, UserError
from quantmill.files import read_json
from quantmill.sources import split_branch
from quantmill.types import QuantConfig

EVAL_REPORT = "eval_report.json"


@dataclass(frozen=True, slots=True)
class Parameters:
    """What a folder's own files say."""

    model_type: str
    config: QuantConfig | None  # None: not quantised
    size: int  # bytes of the weights
    mean_kl: float | None
    perplexity: float | None

    def rows(self) -> list[tuple[str, str]]:
        """For people: name and value."""
        rows = [("type", self.model_type), ("size", gigabytes(self.size))]
        if c := self.config:
            group = "one per row" if c.group_size == -1 else str(c.group_size)
            rows += [("bits", str(c.bits)), ("group size", group)]
            rows += [("act order", "yes" if c.desc_act else "no"), ("symmetric", "yes" if c.sym else "no")]
            rows += [("damp %", f"{c.damp_percent:g}")]
        if self.perplexity is not None:
            rows.append(("perplexity", f"{self.perplexity:.3f}"))
        if self.mean_kl is not None:
            rows.append(("KL to the original", f"{self.mean_kl:.4f} nats/token"))
        return rows


def read_parameters(folder: Path) -> Parameters:
    """Raises BadCheckpoint or UnsupportedModel where the folder is no model that we read."""
    opened = open_checkpoint(folder)
    try:
        measured = read_json(folder / EVAL_REPORT)
    except UserError:
        measured = {}
    return Parameters(
        model_type=str(opened.config.get("model_type", "?")),
        config=opened.quant_config if opened.quant is not None else None,
        size=sum(t.nbytes for t in opened.tensors.values()),
        mean_kl=_number(measured.get("mean_kl")),
        perplexity=_number(measured.get("perplexity")),
    )


def cached_models() -> list[str]:
    """`owner/name` and `owner/name:branch` of every whole model in the shared Hugging Face cache."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        return []
    found = []
    for repository in repositories:
        for revision in repository.revisions:
            if repository.repo_type == "model" and _whole(revision.snapshot_path):
                refs = sorted(revision.refs)
                found += [repository.repo_id if r == "main" else f"{repository.repo_id}:{r}" for r in refs]
    return sorted(found)


def _whole(folder: Path) -> bool:
    """config.json is fetched last, so where it is the weights are; a link may point to what was deleted."""
    weights = list(folder.glob("*.safetensors"))
    return (folder / "config.json").exists() and bool(weights) and all(w.exists() for w in weights)


@dataclass(frozen=True, slots=True)
class Fetching:
    """How far a download is."""

    done: int
    total: int
    folder: Path | None = None  # set in the last report


class Stopped(Exception):
    """The user cancelled."""


class Download:
    """One download in a thread of its own; cancelling keeps what has come, the next try goes on from there."""

    def __init__(self, asked: str) -> None:
        self.name, self.branch = _repository(asked)
        self._reports: SimpleQueue[Fetching | BaseException] = SimpleQueue()
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        self._cancelled.set()

    def run(self, every: float = 0.3) -> Iterator[Fetching]:
        """Yields how far it is until the last report, which has the folder. Raises what went wrong, or Stopped."""
        worker = threading.Thread(target=self._work, daemon=True)
        worker.start()
        last = Fetching(0, 0)
        while True:
            try:
                report = self._reports.get(timeout=every)
            except Empty:
                yield last
                continue
            if isinstance(report, BaseException):
                raise report
            last = report
            if last.folder is not None:
                yield last
                return

    def _work(self) -> None:
        from huggingface_hub import HfApi

        from quantmill.hub import download

        try:
            api = HfApi()
            plan = download.plan(self.name, self.branch, api, None, None)
            state = Fetching(0, plan.left)
            lock = threading.Lock()

            def advance(n: int) -> None:
                nonlocal state
                if self._cancelled.is_set():
                    raise Stopped
                with lock:
                    state = replace(state, done=state.done + n)
                self._reports.put(state)

            folder = download.fetch(plan, api, advance)
            self._reports.put(Fetching(plan.left, plan.left, folder))
        except (QuantmillError, OSError, Stopped) as error:
            self._reports.put(error)


def branch_rows(asked: str) -> tuple[str, list[list[str]], str | None]:
    """A repository's branches -> its name, rows for a table, and the branch that is best for this machine.

    Raises SourceNotFound or BadRequest.
    """
    from huggingface_hub import HfApi

    from quantmill.hub.branches import read_branches
    from quantmill.hub.machine import this_machine

    name, _ = _repository(asked)
    found = read_branches(name, HfApi(), this_machine())
    rows = []
    for b in found:
        c = b.config
        kl = "" if b.mean_kl is None else f"{b.mean_kl:.4f}"
        fixed = [str(c.bits), str(c.group_size), "yes" if c.desc_act else "no"] if c else ["", "", ""]
        rows.append([b.name, *fixed, gigabytes(b.size), kl, f"{b.fits} ★" if b.best else b.fits])
    return name, rows, next((b.name for b in found if b.best), None)


def _repository(asked: str) -> tuple[str, str | None]:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    name, branch = split_branch(asked.strip())
    try:
        validate_repo_id(name)
    except HFValidationError:
        name = ""
    if name.count("/") != 1:
        raise BadRequest(f"{asked!r} is no repository: write owner/name or owner/name:branch")
    return name, branch


def choices(started_with: Sequence[str]) -> list[str]:
    """Everything that can be picked, each once."""
    return list(dict.fromkeys([*started_with, *cached_models()]))


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None
