"""Guessing ahead changes nothing but the number of passes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from quantmill.runtime.interface import Piece, RuntimeFacts
from quantmill.runtime.lookup import Guessing, Index, Pace, Tally, generate_ahead
from quantmill.runtime.sampling import SamplerState, sample
from quantmill.runtime.single import SingleSequence
from quantmill.types import SamplingParams
from toy_runtime import ToyRuntime, told

VOCAB = 12
FACTS = RuntimeFacts("toy", VOCAB, 4, 400, None, 8, 32, 4, 1, 1, ())
GREEDY = SamplingParams(temperature=0, repetition_penalty=1)
WARM = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1, seed=5)


class Toy:
    """A model whose next token depends on the last `memory` tokens; refuses rows that it has not been told of."""

    facts = FACTS

    def __init__(self, memory: int) -> None:
        self.memory, self.text, self.passes = memory, [0] * FACTS.context, 0

    def forward(self, pieces: Sequence[Piece]) -> np.ndarray:
        (piece,) = pieces
        self.passes += 1
        self.text[piece.start : piece.start + len(piece.tokens)] = piece.tokens
        ends = range(piece.start, piece.start + len(piece.tokens))
        rows = [self._logits(end) for end in (ends if piece.every else ends[-1:])]
        return np.stack(rows)

    def _logits(self, end: int) -> np.ndarray:
        seen = self.text[max(0, end + 1 - self.memory) : end + 1]
        seed = sum((t + 1) * 31**i for i, t in enumerate(seen))
        return np.random.default_rng(seed).normal(0, 2, VOCAB).astype(np.float32)


def plainly(params: SamplingParams, ids: list[int], count: int, memory: int) -> list[int]:
    toy, state, text = Toy(memory), SamplerState(params, ids), list(ids)
    logits = toy.forward([Piece(ids, 0, range(8))])
    for _ in range(count):
        text.append(sample(logits[0], state).token)
        logits = toy.forward([Piece(text[-1:], len(text) - 1, range(8))])
    return text[len(ids) :]


@pytest.mark.parametrize("params", [GREEDY, WARM])
@pytest.mark.parametrize("memory", [1, 3, 40])
@pytest.mark.parametrize("count", [1, 2, 9, 150])
def test_the_answer_is_the_same(params, memory, count):
    ids = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    toy, state, tally = Toy(memory), SamplerState(params, ids), Tally()
    draw = lambda row: sample(row[0], state).token  # noqa: E731
    found = list(generate_ahead(SingleSequence(toy), ids, draw, most=count, tally=tally))
    assert found == plainly(params, ids, count, memory)
    assert state.step == count
    assert toy.passes == tally.passes + 1


def test_a_text_that_repeats_takes_few_passes():
    toy, state, tally = Toy(1), SamplerState(GREEDY, [3]), Tally()
    answer = list(
        generate_ahead(SingleSequence(toy), [3], lambda r: sample(r[0], state).token, most=200, tally=tally)
    )
    assert len(answer) == 200
    assert tally.passes < 50
    assert tally.right > 150


def test_guesses_that_never_hold_are_given_up_for_a_while():
    toy, tally, guessing = Toy(40), Tally(), Guessing(shortest=1)
    state = SamplerState(WARM, [3])
    list(
        generate_ahead(
            SingleSequence(toy),
            [3],
            lambda r: sample(r[0], state).token,
            most=300,
            guessing=guessing,
            tally=tally,
        )
    )
    assert tally.guessed < 300 * guessing.most * 0.5
    assert toy.passes <= 301


def test_the_longest_and_latest_n_gram_is_looked_up():
    index = Index([1, 2, 3, 7, 9, 2, 3, 8, 1, 2, 3], Guessing(longest=3, shortest=2))
    assert index.guess(3) == [7, 9, 2]  # after 1 2 3, not after the later 2 3
    index.add(8)
    assert index.guess(3) == [1, 2, 3]  # after 2 3 8
    assert Index([5, 6, 5, 6, 5, 6], Guessing()).guess(5) == [5, 6, 5, 6, 5]
    assert Index([1, 2, 3], Guessing()).guess(5) == []


def test_nothing_passes_the_context():
    toy, state = Toy(1), SamplerState(GREEDY, [3])
    ids = [3] * 390
    assert (
        len(list(generate_ahead(SingleSequence(toy), ids, lambda r: sample(r[0], state).token, most=10)))
        == 10
    )


def test_pauses_grow_until_a_guess_is_right():
    pace, guessed_at = Pace(Guessing(patience=2, pause=4, longest_pause=16)), []
    for token in range(60):
        if not pace.rests():
            guessed_at.append(token)
            pace.seen(3, 0)
    assert guessed_at == [0, 1, 6, 7, 16, 17, 34, 35, 52, 53]  # pauses of 4, 8, 16, 16 tokens


def test_a_guess_that_paid_makes_up_for_one_that_did_not():
    pace = Pace(Guessing(patience=1, pause=4))
    pace.seen(3, 3)
    assert pace.most == Guessing().most
    pace.seen(7, 0)
    assert pace.most == Guessing().least
    assert not pace.rests()
    pace.seen(3, 0)
    assert [pace.rests() for _ in range(5)] == [True] * 4 + [False]


def test_where_guesses_never_pay_few_are_made():
    pace, guesses = Pace(Guessing()), 0
    for _ in range(256):
        if not pace.rests():
            guesses += 1
            pace.seen(3, 1)  # one token of three: the pass cost more
    assert guesses <= 4


def test_one_right_token_of_a_cut_guess_pays():
    pace = Pace(Guessing())
    pace.seen(1, 1)
    assert not pace.rests()
    assert pace.most == Guessing().most


@pytest.mark.parametrize(
    ("window", "pages", "max_tokens"), [(100, 4, 256), (128, 4, 64), (70, 3, 256), (None, 7, 256)]
)
def test_guesses_that_fall_leave_a_window_whole(window, pages, max_tokens):
    """In the smallest cache that the window allows, round and round, guessing all the time."""
    toy = ToyRuntime(pages, context=448, window=window, vocab=3, ends=(), max_tokens=max_tokens)
    params = SamplingParams(
        temperature=0.7, top_k=0, top_p=1.0, repetition_penalty=1.2, max_new_tokens=400, seed=2
    )
    ids, tally = [0, 1, 2, 1, 0, 1, 2] * 3, Tally()
    state = SamplerState(params, ids)
    eager = Guessing(shortest=1, patience=1000)
    draw = lambda row: sample(row[0], state).token  # noqa: E731
    sequence = SingleSequence(toy)
    assert list(generate_ahead(sequence, ids, draw, most=400, guessing=eager, tally=tally)) == told(
        toy, ids, params
    )
    assert 0 < tally.right < tally.guessed


def test_an_answer_that_was_left_does_not_spoil_the_next():
    """Guessed tokens that were read but never said are read over."""
    toy = ToyRuntime(8, context=448, vocab=3, ends=())
    params = SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=60)
    sequence, ids = SingleSequence(toy), [0, 1, 2] * 9

    def answer(asked, most):
        state = SamplerState(params, asked)
        ahead = generate_ahead(sequence, asked, lambda row: sample(row[0], state).token, most=400)
        return [next(ahead) for _ in range(most)]

    first = answer(ids, 11)
    assert first == told(toy, ids, params)[:11]
    again = [*ids, *first[:9], 2, 2]
    assert answer(again, 20) == told(toy, again, params)[:20]
