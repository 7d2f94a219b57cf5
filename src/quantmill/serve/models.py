"""The models of a server: by name, loaded when they are first asked for, dropped when others need the memory.

Everything but `register`, `infos`, `info` and `branches` is to be awaited in the server's event loop, which is
`service.loop`. Other threads go through `asyncio.run_coroutine_threadsafe`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantmill.console import gigabytes
from quantmill.errors import BadRequest, Busy, QuantmillError, SourceNotFound
from quantmill.files import read_json
from quantmill.runtime.llm import LLM
from quantmill.serve.refusal import no_model
from quantmill.sources import split_branch
from quantmill.types import Json

if TYPE_CHECKING:
    from quantmill.hub.branches import RemoteBranch
    from quantmill.serve.settings import ServeSettings

Opener = Callable[[str], tuple[Path, LLM]]  # blocking: a source -> its folder and the model, ready to answer
log = logging.getLogger("quantmill.serve")


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What is known of a model without asking it."""

    name: str
    source: str
    state: str  # idle, loading, ready, failed
    users: int  # requests under way
    weight_bytes: int  # 0 while not loaded
    cache_bytes: int
    folder: Path | None = None
    runtime: str | None = None  # "cpu int16"
    context: int | None = None
    parameters: Json | None = None  # quantization_config of config.json
    error: str | None = None

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.cache_bytes


class _Entry:
    """One name's changing part."""

    def __init__(self, name: str, source: str) -> None:
        self.name, self.source = name, source
        self.llm: LLM | None = None
        self.folder: Path | None = None
        self.state = "idle"
        self.error: str | None = None
        self.users, self.used = 0, 0.0
        self.weight_bytes = self.cache_bytes = 0

    def info(self) -> ModelInfo:
        facts = self.llm.facts if self.llm is not None else None
        return ModelInfo(
            self.name,
            self.source,
            self.state,
            self.users,
            self.weight_bytes,
            self.cache_bytes,
            self.folder,
            facts.name if facts else None,
            facts.context if facts else None,
            _parameters(self.folder),
            self.error,
        )


class ModelService:
    """All models of a server. `open_model` loads one, `budget` is what all may take together, in bytes."""

    def __init__(self, open_model: Opener, budget: int) -> None:
        self._open, self.budget = open_model, budget
        self.overrides: dict[str, ServeSettings] = {}  # by source: a model that is opened differently
        self._entries: dict[str, _Entry] = {}
        self._lock: asyncio.Lock | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        self.closing = False

    def register(self, typed: str) -> list[str]:
        """Names for what a user typed: SOURCE or NAME=SOURCE. A folder of branches has one name for each.

        Nothing is loaded or fetched. Raises BadRequest where a name is taken.
        """
        name, equals, source = typed.partition("=")
        if not equals or "/" in name or Path(typed).exists():
            name, source = "", typed
        found = _names(source, name)
        for new, where in found.items():
            if new in self._entries and self._entries[new].source != where:
                raise BadRequest(f"two models are called {new}: name one of them, as in other={where}")
            self._entries.setdefault(new, _Entry(new, where))
        return list(found)

    def forget(self, names: Iterable[str]) -> None:
        """Serve these no more, those that are not loaded."""
        for name in names:
            if name in self._entries and self._entries[name].llm is None:
                del self._entries[name]

    def infos(self) -> list[ModelInfo]:
        return [e.info() for e in list(self._entries.values())]

    def info(self, name: str) -> ModelInfo:
        """Raises Refusal for a name that is not served."""
        return self._entry(name).info()

    def source(self, name: str) -> str:
        """Where a model comes from; the name itself where there is none of that name."""
        entry = self._entries.get(name)
        return entry.source if entry is not None else name

    def ready(self) -> list[tuple[str, LLM]]:
        """The models that are loaded."""
        return [(e.name, e.llm) for e in list(self._entries.values()) if e.llm is not None]

    @staticmethod
    def branches(repository: str) -> tuple[RemoteBranch, ...]:
        """The branches of owner/name on the hub; blocking. Raises SourceNotFound, BadRequest."""
        from huggingface_hub import HfApi

        from quantmill.hub.branches import read_branches
        from quantmill.hub.machine import this_machine

        return read_branches(repository, HfApi(), this_machine())

    @contextlib.asynccontextmanager
    async def using(self, name: str) -> AsyncIterator[LLM]:
        """The model, loaded if need be, and not dropped in the meantime. Raises Refusal, Busy, QuantmillError."""
        entry = self._entry(name)
        entry.users += 1  # from now on nobody drops it
        try:
            llm = entry.llm
            if llm is None or not llm.engine.alive:
                llm = await self._load(entry)
            yield llm
        finally:
            entry.users -= 1
            entry.used = time.monotonic()

    async def hold(self, name: str) -> LLM:
        """`using` in two calls, for a thread: the model is not dropped before as many `let_go`."""
        entry = self._entry(name)
        if entry.llm is None:
            raise BadRequest(f"{name} is not loaded: load it first")
        entry.users += 1
        return entry.llm

    def let_go(self, name: str) -> None:
        """See `hold`; in the loop."""
        entry = self._entry(name)
        entry.users -= 1
        entry.used = time.monotonic()

    async def load(self, name: str) -> ModelInfo:
        """Load a model now."""
        async with self.using(name):
            return self.info(name)

    async def take(self, typed: str) -> ModelInfo:
        """Load a model now, by its name or as `register` takes it: forgotten again where it cannot be loaded."""
        if typed in self._entries:
            return await self.load(typed)
        before = set(self._entries)
        names = self.register(typed)
        try:
            return await self.load(names[0])
        except QuantmillError:
            self.forget(set(names) - before)
            raise

    async def unload(self, name: str, force: bool = False) -> ModelInfo:
        """Drop a model's memory; its name stays. Raises Busy while answers are under way, unless `force`."""
        entry = self._entry(name)
        async with self._one_at_a_time():
            if entry.users and not force:
                raise Busy(f"{name} is answering {entry.users} requests: wait, or use force", 5)
            await self._drop(entry)
        return entry.info()

    async def close(self, seconds: float = 0.0) -> None:
        """Drop everything; answers under way get so many seconds to end."""
        self.closing = True
        ready = [e for e in self._entries.values() if e.llm is not None]
        await asyncio.gather(*(asyncio.to_thread(e.llm.engine.drain, seconds) for e in ready if e.llm))
        for entry in ready:
            await self._drop(entry)

    def _entry(self, name: str) -> _Entry:
        """Branches of a repository that is served are served, too."""
        entry = self._entries.get(name)
        if entry is None:
            repository, branch = split_branch(name)
            served = {
                split_branch(e.source)[0] for e in self._entries.values() if not Path(e.source).exists()
            }
            if branch is None or repository not in served or not _plausible(branch):
                raise no_model(name, list(self._entries))
            entry = _Entry(name, name)
        return entry

    def _one_at_a_time(self) -> asyncio.Lock:
        if self._lock is None:
            self._lock = asyncio.Lock()
        return self._lock

    async def _load(self, entry: _Entry) -> LLM:
        async with self._one_at_a_time():
            if self.closing:
                raise Busy("the server is shutting down", 10)
            if entry.llm is not None and entry.llm.engine.alive:  # somebody else was quicker
                return entry.llm
            if entry.llm is not None:
                log.warning("model restarts", extra={"model": entry.name, "error": entry.llm.engine.failure})
                await self._drop(entry)
            entry.state, began = "loading", time.monotonic()
            try:
                await self._make_room(weight_bytes(entry.source))
                entry.folder, llm = await asyncio.to_thread(self._open, entry.source)
            except QuantmillError as error:
                entry.state, entry.error = "idle" if isinstance(error, Busy) else "failed", str(error)
                raise
            entry.llm, facts = llm, llm.facts
            entry.weight_bytes = weight_bytes(str(entry.folder))
            entry.cache_bytes = facts.pages * facts.bytes_per_page
            entry.state, entry.error = "ready", None
            self._entries.setdefault(entry.name, entry)
            seconds = round(time.monotonic() - began, 2)
            log.info("model loaded", extra={"model": entry.name, "runtime": facts.name, "seconds": seconds})
            return llm

    async def _make_room(self, need: int) -> None:
        """Drop models that nobody uses, the longest unused first, until `need` bytes more fit the budget."""
        if need > self.budget:
            raise BadRequest(
                f"the model takes {gigabytes(need)}, all models together may take {gigabytes(self.budget)}: "
                "choose fewer bits, or raise --memory"
            )
        while sum(e.weight_bytes + e.cache_bytes for e in self._entries.values()) + need > self.budget:
            idle = [e for e in self._entries.values() if e.llm is not None and not e.users]
            if not idle:
                raise Busy("other models are answering and hold the memory", 5)
            await self._drop(min(idle, key=lambda e: e.used))

    async def _drop(self, entry: _Entry) -> None:
        llm, entry.llm = entry.llm, None
        entry.state, entry.weight_bytes, entry.cache_bytes = "idle", 0, 0
        if llm is not None:
            await asyncio.to_thread(llm.close)
            log.info("model dropped", extra={"model": entry.name})


def _names(source: str, name: str) -> dict[str, str]:
    """API names -> sources."""
    path = Path(source).expanduser()
    if path.is_file():
        return {name or path.stem: source}
    if not path.is_dir():
        return {name or source: source}
    name = name or path.resolve().name
    if (path / "config.json").is_file():
        return {name: source}
    branches = sorted(p for p in path.iterdir() if (p / "config.json").is_file())
    if not branches:
        raise SourceNotFound(f"{source} holds no model: name a folder with config.json")
    default = next((p for p in branches if p.name == "main"), branches[0])
    return {name: str(default), **{f"{name}:{p.name}": str(p) for p in branches}}


def _plausible(branch: str) -> bool:
    """A branch name that may be asked of a hub: no way out of anything."""
    fine = all(c.isalnum() or c in "._-" for c in branch)
    return fine and branch.isascii() and not branch.startswith((".", "-")) and len(branch) <= 100


def weight_bytes(source: str) -> int:
    """The size of a folder's weight files; 0 for what is not here yet."""
    path = Path(source).expanduser()
    if path.is_file():
        return path.stat().st_size
    return sum(f.stat().st_size for f in path.glob("*.safetensors")) if path.is_dir() else 0


def _parameters(folder: Path | None) -> Json | None:
    if folder is None or not (folder / "config.json").is_file():
        return None
    found = read_json(folder / "config.json").get("quantization_config")
    return found if isinstance(found, dict) else None
