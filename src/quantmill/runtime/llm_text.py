"""From the engine's events to text: whole characters, stop strings across token borders, several answers at once.

Knows no thread and no loop: llm.py brings the events here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from quantmill.errors import QuantmillError
from quantmill.runtime.engine_types import (
    EmbeddingEvent,
    Event,
    FinishEvent,
    PromptEvent,
    Reason,
    TokenEvent,
)
from quantmill.runtime.interface import Floats
from quantmill.runtime.sampling import Sampled
from quantmill.runtime.tokenizer import Detokenizer, TextTokenizer
from quantmill.types import SamplingParams

StopChoice = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Ending:
    """How an answer ended and what it took."""

    reason: Reason
    completion_tokens: int  # the one that ended it included
    cached_tokens: int  # of the prompt
    logprob: float  # of the whole answer, where the parameters ask for any
    stop: str | None = None  # the stop string that was found


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new in one answer. `text` may be "" while characters or possible stop strings are held back."""

    choice: int
    text: str
    tokens: tuple[Sampled, ...] = ()
    ending: Ending | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer, whole."""

    index: int
    text: str
    tokens: tuple[Sampled, ...]
    ending: Ending

    @property
    def token_ids(self) -> list[int]:
        return [s.token for s in self.tokens]


@dataclass(frozen=True, slots=True)
class Answer:
    """All that came of one prompt."""

    prompt_ids: tuple[int, ...]
    choices: tuple[Choice, ...]
    prompt_scores: tuple[Sampled, ...] = ()  # of the prompt's tokens from the second on, where asked for
    embedding: Floats | None = None

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def completion_tokens(self) -> int:
        return sum(c.ending.completion_tokens for c in self.choices)


class StopText:
    """Text in, text out, up to the first stop string; holds back what may be the beginning of one."""

    def __init__(self, stops: Iterable[str]) -> None:
        self.stops = tuple(s for s in stops if s)
        self.found: str | None = None
        self._held = ""

    def over(self) -> bool:
        """Whether a stop string was found."""
        return self.found is not None

    def push(self, text: str) -> str:
        """What can be shown now."""
        if self.found is not None or not self.stops:
            return "" if self.found is not None else text
        self._held += text
        places = [(at, s) for s in self.stops if (at := self._held.find(s)) >= 0]
        if places:
            at, self.found = min(places, key=lambda place: place[0])
            shown, self._held = self._held[:at], ""
            return shown
        keep = max(overlap(self._held, s) for s in self.stops)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def flush(self) -> str:
        shown, self._held = self._held, ""
        return shown


def overlap(text: str, stop: str) -> int:
    """The longest end of `text` that is a beginning of `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-size:]):
            return size
    return 0


@dataclass
class _Line:
    """One answer under way."""

    detokenizer: Detokenizer
    stop: StopText
    count: int = 0
    text: list[str] = field(default_factory=list)
    tokens: list[Sampled] = field(default_factory=list)
    ending: Ending | None = None


class Reply:
    """All answers to one request under way. `stop_choice` is called when a stop string ends one of them."""

    def __init__(
        self,
        prompt_ids: tuple[int, ...],
        params: SamplingParams,
        tokenizer: TextTokenizer,
        stop_choice: StopChoice,
    ) -> None:
        self.prompt_ids, self.params, self._stop_choice = prompt_ids, params, stop_choice
        count = params.best_of or params.n
        self._lines = [_Line(Detokenizer(tokenizer), StopText(params.stop)) for _ in range(count)]
        self.scores: list[Sampled] = []
        self.embedding: Floats | None = None

    @property
    def done(self) -> bool:
        return all(line.ending is not None for line in self._lines)

    def feed(self, events: Iterable[Event]) -> list[Delta]:
        """What is new, tokens of one answer that came at once in one piece. Raises QuantmillError where the engine
        could not go on."""
        deltas: list[Delta] = []
        for event in events:
            if isinstance(event, PromptEvent):
                self.scores += event.scores
            elif isinstance(event, EmbeddingEvent):
                self.embedding = event.vector
            elif isinstance(event, TokenEvent):
                self._token(event, deltas)
            else:
                self._finish(event, deltas)
        return deltas

    def answer(self) -> Answer:
        """The n best of what was drawn, by mean log probability where more were drawn than are wanted."""
        made = [(i, line) for i, line in enumerate(self._lines) if line.ending is not None]
        if len(made) > self.params.n:
            made = sorted(made, key=lambda pair: -_mean(pair[1].ending))[: self.params.n]
        choices = tuple(
            Choice(i, "".join(line.text), tuple(line.tokens), line.ending)
            for i, (_, line) in enumerate(made)
            if line.ending is not None
        )
        return Answer(self.prompt_ids, choices, tuple(self.scores), self.embedding)

    def _token(self, event: TokenEvent, deltas: list[Delta]) -> None:
        line = self._lines[event.choice]
        if line.stop.over():  # drawn before the engine heard of the stop string
            return
        line.count += 1
        line.tokens.append(event.sampled)
        text = line.stop.push(line.detokenizer.push(event.sampled.token))
        line.text.append(text)
        tokens: tuple[Sampled, ...] = (event.sampled,)
        if deltas and deltas[-1].choice == event.choice and deltas[-1].ending is None:
            before = deltas.pop()  # who reads slowly gets larger pieces, and the server less to send
            text, tokens = before.text + text, before.tokens + tokens
        deltas.append(Delta(event.choice, text, tokens))
        if line.stop.over():
            self._stop_choice(event.choice)

    def _finish(self, event: FinishEvent, deltas: list[Delta]) -> None:
        if event.reason is Reason.ERROR:
            raise QuantmillError(event.message)
        line = self._lines[event.choice]
        text = line.stop.push(line.detokenizer.flush()) + line.stop.flush()
        stopped = line.stop.over()
        reason = Reason.STOP if stopped else event.reason
        count = line.count if stopped else event.completion_tokens
        line.ending = Ending(reason, count, event.cached_tokens, event.logprob, line.stop.found)
        line.text.append(text)
        deltas.append(Delta(event.choice, text, (), line.ending))


def _mean(ending: Ending | None) -> float:
    return ending.logprob / max(1, ending.completion_tokens) if ending is not None else -1e9
