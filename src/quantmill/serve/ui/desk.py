"""What the tabs need from the server, in one place: models loaded and let go, text streamed, prompts shown.

The tabs see this and no engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from quantmill.serve.ui.store import ModelSettings, Store
from quantmill.types import SamplingParams

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in memory."""

    name: str
    folder: Path
    backend: str  # "cpu int16", "cuda fp16"
    context: int
    weight_bytes: int
    cache_bytes: int
    has_template: bool


@dataclass(frozen=True, slots=True)
class Spoken:
    """The end of an answer."""

    prompt_tokens: int
    completion_tokens: int
    seconds: float
    finish: str  # stop, length, aborted

    @property
    def tok_s(self) -> float:
        return self.completion_tokens / self.seconds if self.seconds else 0.0


class Answer(Protocol):
    """An answer on its way: pieces of text, then how it ended."""

    def __iter__(self) -> Iterator[str | Spoken]: ...

    def stop(self) -> None:
        """End it at once, from any thread; what has come stands, `finish` is "aborted"."""
        ...


class Desk(Protocol):
    """Callable from any thread. Raises the classes of errors.py."""

    def known(self) -> Sequence[str]:
        """Names that the server was started with or has loaded."""
        ...

    def loaded(self) -> Sequence[Loaded]: ...

    def load(self, name: str, settings: ModelSettings) -> Loaded:
        """Blocks until the model answers; a model that is loaded with other settings is loaded anew."""
        ...

    def unload(self, name: str) -> None: ...

    def prompt_text(self, name: str, messages: Sequence[Message]) -> str:
        """A conversation as the model's own template writes it."""
        ...

    def answer(
        self, name: str, messages: Sequence[Message], params: SamplingParams, *, go_on: bool = False
    ) -> Answer:
        """The next turn. `go_on`: more of the last turn, which is the model's."""
        ...

    def go_on(self, name: str, text: str, params: SamplingParams) -> Answer:
        """More of a plain text."""
        ...


@dataclass(frozen=True, slots=True)
class Room:
    """What every tab gets."""

    desk: Desk
    store: Store
