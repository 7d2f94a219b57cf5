"""Speculative decoding by prompt lookup: guess what comes from what the text said before, check in one pass.

The longest recent n-gram that occurred earlier is looked up, and what followed it there is the guess (Saxena,
2023, "prompt lookup decoding"). One pass gives the logits after every guessed token. A guess stands where it is
what the sampler draws from those logits, so the answer is, token for token, what it would have been without
guessing: greedy or sampled, as a sampler's random numbers depend on the position alone. Knows no text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from quantmill.runtime.interface import Logits
from quantmill.runtime.single import SingleSequence

Draw = Callable[[Logits], int]  # logits (1, vocab) -> the next token, noted in the sampler's state


@dataclass(frozen=True, slots=True)
class Guessing:
    """How guesses are made."""

    longest: int = 4  # tokens of an n-gram that is looked up
    shortest: int = 3
    least: int = 3  # tokens guessed at once where the last guess was not right ...
    most: int = 7  # ... and where it was: with the one before them, a pass of 8 rows
    worth: int = 2  # a guess of which fewer were right did not pay
    patience: int = 1  # after so many guesses that did not pay, more than those before them that did ...
    trust: int = 3  # (of those that did, at most so many count)
    pause: int = 32  # ... so many tokens pass without a guess, twice as many each time until one pays
    longest_pause: int = 256


class Pace:
    """How much is guessed, by how guesses have turned out: texts that do not repeat themselves lose little.

    Where no guess ever pays, 256 tokens see at most four: even if a pass with a guess takes three times as long as
    one without (small models; large ones 1.4 times), that is 3 %.
    """

    def __init__(self, guessing: Guessing) -> None:
        self._guessing = guessing
        self._wrong = self._rest = 0
        self._pause = guessing.pause
        self.most = guessing.least

    def rests(self) -> bool:
        """Whether the next token is not guessed; asked once a pass."""
        self._rest -= 1
        return self._rest >= 0

    def seen(self, guessed: int, right: int) -> None:
        """A pass has shown how many of the guessed tokens were right."""
        if not guessed:
            return
        self.most = self._guessing.most if right == guessed else self._guessing.least
        if right >= min(self._guessing.worth, guessed):
            self._wrong = max(min(self._wrong, 0) - 1, -self._guessing.trust)
            self._pause = self._guessing.pause
            return
        self._wrong += 1
        if self._wrong >= self._guessing.patience:
            self._wrong, self._rest = 0, self._pause
            self._pause = min(2 * self._pause, self._guessing.longest_pause)


class Index:
    """Where every n-gram of a growing text ended last, so that a lookup costs the same however long the text is."""

    def __init__(self, ids: Sequence[int], guessing: Guessing) -> None:
        self._sizes = range(guessing.longest, guessing.shortest - 1, -1)
        self.ids: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}  # n-gram -> where the text went on after it
        for token in ids:
            self.add(token)

    def add(self, token: int) -> None:
        """The text goes on with a token."""
        for size in self._sizes:  # what ended before this token is now known to go on
            if len(self.ids) >= size:
                self._ends[tuple(self.ids[-size:])] = len(self.ids)
        self.ids.append(token)

    def guess(self, most: int) -> list[int]:
        """What followed the longest n-gram at the end of the text the last time; [] where none was there before."""
        for size in self._sizes:
            if len(self.ids) < size:
                continue
            at = self._ends.get(tuple(self.ids[-size:]))
            if at is not None:
                return self._ahead(at, most)
        return []

    def _ahead(self, at: int, most: int) -> list[int]:
        """`most` tokens from `at` on; where the text ends first, it repeats."""
        period = len(self.ids) - at
        return [self.ids[at + i % period] for i in range(most)]


@dataclass(slots=True)
class Tally:
    """What guessing came to."""

    passes: int = 0
    guessed: int = 0
    right: int = 0


def generate_ahead(
    sequence: SingleSequence,
    ids: Sequence[int],
    draw: Draw,
    *,
    most: int,
    guessing: Guessing | None = None,
    tally: Tally | None = None,
) -> Iterator[int]:
    """Yield the answer to the prompt `ids`, at most `most` tokens; stop by no longer asking.

    draw: takes logits (1, vocab), gives the token and notes it; it is called once for every token that is
    yielded, in order, and never for a guess that fell.
    """
    guessing, tally = guessing or Guessing(), tally or Tally()
    index, pace, made = Index(ids, guessing), Pace(guessing), 0
    token = draw(sequence.go_on_to(ids))
    while True:
        made += 1
        index.add(token)
        yield token
        if made == most:
            return
        room = min(most - made, sequence.at_once, sequence.runtime.facts.context - sequence.position)
        guess = [] if pace.rests() else index.guess(pace.most)[: room - 1]
        rows = sequence.score([token, *guess]) if guess else sequence.read([token])
        tally.passes += 1
        tally.guessed += len(guess)
        token, stood = draw(rows[:1]), 0
        while stood < len(guess) and token == guess[stood]:
            stood += 1
            made += 1
            index.add(token)
            yield token
            token = draw(rows[stood : stood + 1])
        sequence.reset(sequence.position - len(guess) + stood)
        tally.right += stood
        pace.seen(len(guess), stood)
