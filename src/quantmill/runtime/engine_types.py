"""What goes into the engine and what comes out of it. No text, no HTTP, no tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from quantmill.runtime.constraints import Constraint
from quantmill.runtime.interface import Floats
from quantmill.runtime.pages import PageCounts
from quantmill.runtime.sampling import Mask, Sampled
from quantmill.types import SamplingParams


class Reason(StrEnum):
    """Why an answer ended."""

    STOP = (
        "stop"  # an end token, a stop token, the end of its grammar, or a stop string found above the engine
    )
    LENGTH = "length"  # max_new_tokens, the model's context, or the cache
    ABORT = "abort"  # nobody wants it any more
    ERROR = "error"


class Matcher(Protocol):
    """What a constraint looks like to the engine (constraints.py)."""

    def mask(self) -> Mask:
        """(vocab,) True where a token may come next."""
        ...

    def accept(self, token: int) -> bool:
        """Go on by one token -> True where nothing may follow it."""
        ...


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How an engine shares out its runtime."""

    max_waiting: int = 256  # requests that may wait; the next one is refused with Busy
    max_running: int | None = None  # answers in one pass; None: as many as the runtime takes
    pass_seconds: float = 0.1  # what prompts may add to a pass while answers wait for their next token
    prefix_cache: bool = True
    # Prompts are cut at multiples of this only (a multiple of PAGE), for back ends whose bits depend on a piece's
    # length: so an answer does not depend on what else there is to do. 0: anywhere; None: as the back end needs.
    cut: int | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt to be answered (or scored, or embedded)."""

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    client: str = ""  # the engine is fair between these
    matcher: Callable[[], Matcher] | None = None  # makes one for each answer
    constraint: Constraint | None = None  # what the matcher stands for: it can go to another process
    score_prompt: int | None = None  # report the prompt's log probabilities with so many alternatives
    embed: bool = False  # no answer: the mean of the last hidden states

    @property
    def choices(self) -> int:
        return 1 if self.embed else self.params.best_of or self.params.n


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """The next token of an answer."""

    request: str
    choice: int
    sampled: Sampled


@dataclass(frozen=True, slots=True)
class PromptEvent:
    """Log probabilities of the prompt's tokens, from the second on. They come in as many events as passes."""

    request: str
    scores: tuple[Sampled, ...]


@dataclass(frozen=True, slots=True)
class EmbeddingEvent:
    """The mean over the prompt of the last hidden states: (hidden_size,) float32."""

    request: str
    vector: Floats


@dataclass(frozen=True, slots=True)
class FinishEvent:
    """The last event of a choice."""

    request: str
    choice: int
    reason: Reason
    last: Sampled | None = None  # the token that ended the answer: no part of it, but generated and counted
    completion_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, taken over from the prefix cache
    logprob: float = 0.0  # of the whole answer, where the parameters ask for any
    message: str = ""  # of an error


Event = TokenEvent | PromptEvent | EmbeddingEvent | FinishEvent


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A look at the engine. Counters only ever grow."""

    waiting: int  # requests not begun, or put aside
    running: int  # answers in the next pass
    pages: PageCounts
    passes: int
    prompt_tokens: int  # computed, not taken over
    cached_tokens: int
    answer_tokens: int
    preemptions: int
    finished: dict[Reason, int]
    busy_seconds: float  # in passes
    weight_bytes: int  # read from memory for the passes, by the runtime's own account
