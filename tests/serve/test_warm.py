"""A model that was warmed up has seen every size, and answers as before."""

from __future__ import annotations

from quantmill.serve.warm import warm_up
from quantmill.types import SamplingParams
from toy_llm import toy_llm


class _Watched:
    """A runtime that notes what passes took."""

    def __init__(self, runtime: object) -> None:
        self._runtime, self.rows, self.longest = runtime, set[int](), 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._runtime, name)

    def forward(self, pieces):
        if all(len(p.tokens) == 1 for p in pieces):
            self.rows.add(len(pieces))
        self.longest = max(self.longest, *(len(p.tokens) for p in pieces))
        return self._runtime.forward(pieces)


def test_all_sizes_are_seen_and_answers_stay() -> None:
    asked = SamplingParams(0.8, max_new_tokens=6, seed=3, ignore_eos=True)
    with toy_llm() as llm:
        before = llm.generate([[5, 6, 7]], asked)[0].choices[0].token_ids
        watched = llm.engine.engine.runtime = _Watched(llm.runtime)
        warm_up(llm, together=(1, 4), prompts=(20, 10**9))
        assert {1, 4} <= watched.rows
        assert watched.longest == 20
        assert llm.generate([[5, 6, 7]], asked)[0].choices[0].token_ids == before
        assert llm.engine.stats().pages.held == 0


def test_a_model_that_fails_is_left_to_its_clients() -> None:
    with toy_llm() as llm:
        llm.engine.close()
        warm_up(llm)
        assert not llm.engine.alive
