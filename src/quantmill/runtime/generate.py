"""Text in, text out, one answer at a time on any runtime, with streaming that never splits a character.

Takes a runtime and a tokenizer that are open. Knows no file, no terminal and no conversation; many answers at
once are the engine's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from quantmill.errors import BadRequest
from quantmill.runtime.interface import Logits, Runtime
from quantmill.runtime.llm_text import StopText
from quantmill.runtime.lookup import Tally, generate_ahead
from quantmill.runtime.sampling import SamplerState, check_tokens, sample_rows
from quantmill.runtime.single import SingleSequence
from quantmill.runtime.tokenizer import Detokenizer, TextTokenizer
from quantmill.types import SamplingParams

OnText = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Generation:
    """An answer and what it cost."""

    text: str
    prompt_tokens: int
    completion_tokens: int  # the one that ended it included
    seconds: float  # the prompt's time included
    stopped: bool = True  # False: cut off by max_new_tokens or the model's context
    first_token_s: float = 0.0  # of `seconds`, until the first token was known
    guesses: Tally | None = None  # where tokens were guessed from the text

    @property
    def tok_s(self) -> float:
        return self.completion_tokens / self.seconds if self.seconds else 0.0


def generate(
    runtime: Runtime,
    tokenizer: TextTokenizer,
    prompt: str,
    params: SamplingParams | None = None,
    *,
    on_text: OnText | None = None,
    chat: bool = True,
    lookup: bool = False,
) -> Generation:
    """Continue `prompt`, or answer it where `chat` and the tokenizer has a chat template.

    `on_text` gets the answer piece by piece as it comes, whole characters only; the pieces joined are
    `.text`. Temperature 0 is greedy; with a seed the same call gives the same text. Ends at any
    end-of-sequence token that the model's configs or the tokenizer name, and before the first of `params.stop`.
    `lookup`: guess what comes from the text so far (lookup.py); the answer is the same, sooner where it repeats.
    Raises BadRequest for an empty prompt or one longer than the context.
    """
    if chat and tokenizer.has_template:
        ids = tokenizer.chat_ids([{"role": "user", "content": prompt}])
    else:
        ids = tokenizer.encode(prompt)
    sequence, params = SingleSequence(runtime), params or SamplingParams()
    return generate_ids(sequence, tokenizer, ids, params, on_text=on_text, lookup=lookup)


def generate_ids(
    sequence: SingleSequence,
    tokenizer: TextTokenizer,
    ids: Sequence[int],
    params: SamplingParams,
    *,
    on_text: OnText | None = None,
    lookup: bool = False,
) -> Generation:
    """The same from token ids; what `sequence` has read of them before is not read again."""
    runtime = sequence.runtime
    most = min(params.max_new_tokens, _room(runtime, ids))
    check_tokens(params, runtime.facts.vocab_size)
    ends = frozenset(() if params.ignore_eos else end_tokens(runtime, tokenizer)) | {*params.stop_token_ids}
    state, text = SamplerState(params, ids), _Text(tokenizer, params.stop, on_text)
    tally = Tally() if lookup else None
    started, first, count, stopped = time.perf_counter(), 0.0, 0, False
    for token in _tokens(sequence, ids, state, most, tally):
        first = first or time.perf_counter() - started
        count += 1
        stopped = token in ends or text.push(token)
        if stopped:
            break
    text.end()
    seconds = time.perf_counter() - started
    return Generation("".join(text.pieces), len(ids), count, seconds, stopped, first, tally)


def _tokens(
    sequence: SingleSequence, ids: Sequence[int], state: SamplerState, most: int, tally: Tally | None
) -> Iterator[int]:
    """At least one token, at most `most`."""

    def draw(logits: Logits) -> int:
        return sample_rows(logits, [state])[0].token

    if tally is not None:
        yield from generate_ahead(sequence, ids, draw, most=most, tally=tally)
        return
    token = draw(sequence.go_on_to(ids))
    yield token
    for _ in range(most - 1):
        token = draw(sequence.read([token]))
        yield token


def end_tokens(runtime: Runtime, tokenizer: TextTokenizer) -> tuple[int, ...]:
    """Every token id that ends an answer: the configs' and the tokenizer's."""
    return tuple(sorted({*runtime.facts.eos_token_ids, *tokenizer.eos_token_ids}))


class _Text:
    """Tokens to text that is shown, up to a stop string."""

    def __init__(self, tokenizer: TextTokenizer, stops: Sequence[str], on_text: OnText | None) -> None:
        self.detokenizer, self.stop, self.on_text = Detokenizer(tokenizer), StopText(stops), on_text
        self.pieces: list[str] = []

    def push(self, token: int) -> bool:
        """Show what this token completes; whether a stop string has been found."""
        self._show(self.stop.push(self.detokenizer.push(token)))
        return self.stop.found is not None

    def end(self) -> None:
        if self.stop.found is None:
            self._show(self.stop.push(self.detokenizer.flush()))
            self._show(self.stop.flush())

    def _show(self, text: str) -> None:
        if text:
            self.pieces.append(text)
            if self.on_text is not None:
                self.on_text(text)


def _room(runtime: Runtime, ids: Sequence[int]) -> int:
    """How many tokens the context has left."""
    context = runtime.facts.context
    if not ids:
        raise BadRequest("the prompt is empty: type some text after --prompt")
    if len(ids) >= context:
        raise BadRequest(
            f"the prompt has {len(ids)} tokens, the model's context is {context}: shorten the prompt"
        )
    return context - len(ids)
