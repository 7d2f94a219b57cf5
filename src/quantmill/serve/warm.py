"""What a GPU prepares when it first sees a size, done before the first client comes: kernels, recorded steps.

Ordinary requests do it, so nothing here knows how a back end works. On a processor there is nothing to do: its
kernels are compiled by then, for every size.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from quantmill.errors import QuantmillError
from quantmill.runtime.interface import PAGE
from quantmill.runtime.llm import LLM
from quantmill.types import SamplingParams

TOGETHER = (1, 2, 4, 8, 16, 32, 64)  # answers in one pass: above, few servers ever come
TOKENS = 8  # of each answer: enough for all to be under way at once
PROMPTS = (*range(40, 512, 64), 700, 1100, 2040)  # tokens: one of every way that a prompt can take
log = logging.getLogger("quantmill.serve")


def warm_up(llm: LLM, together: Sequence[int] = TOGETHER, prompts: Sequence[int] = PROMPTS) -> None:
    """Answer prompts of all kinds, so that no client waits for what is done once. Blocking: seconds, where the
    kernels were compiled before.

    A model that fails here is left to its first client: who asks for something is told what is wrong with it.
    """
    began = time.perf_counter()
    facts = llm.facts
    room = facts.pages * PAGE
    try:
        for count in together:
            if count <= min(facts.max_pieces, facts.pages):
                _ask(llm, [[0]] * count)  # a token of each
                _ask(llm, [[0, 0, 0]] * (count // 2))  # several of each, as short prompts have
        # Twice, because some is recorded when it comes again; other tokens each, so that nothing is taken over.
        for token, size in enumerate(2 * tuple(prompts), 1):
            if size < min(facts.context, room):
                _ask(llm, [[token % facts.vocab_size] * size])
    except QuantmillError as error:
        log.warning("the model could not be warmed up", extra={"error": str(error)})
        return
    log.info("model warmed up", extra={"seconds": round(time.perf_counter() - began, 2)})


def _ask(llm: LLM, prompts: list[list[int]]) -> None:
    """Half of them greedily, half of them by chance: both ways to draw."""
    params = [
        SamplingParams(0.8 * (i % 2), max_new_tokens=TOKENS, seed=i, ignore_eos=True)
        for i in range(len(prompts))
    ]
    if prompts:
        llm.generate(prompts, params)
