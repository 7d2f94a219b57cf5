"""Engines over the toy runtime, run to the end, and what they said."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence

from quantmill.runtime.engine import Engine
from quantmill.runtime.engine_types import (
    EngineConfig,
    Event,
    FinishEvent,
    TokenEvent,
)
from quantmill.types import SamplingParams
from toy_runtime import VOCAB

WARM = SamplingParams(
    temperature=1.0, top_p=0.95, top_k=0, repetition_penalty=1.1, max_new_tokens=30, seed=4, ignore_eos=True
)
EAGER = EngineConfig(pass_seconds=math.inf)


def prompt(size: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(random.Random(seed * 1000 + size).randrange(VOCAB - 1) for _ in range(size))


def run(engine: Engine, most: int = 5000) -> list[Event]:
    events: list[Event] = []
    for _ in range(most):
        if not engine.has_work:
            break
        events += engine.step()
    assert not engine.has_work
    return events


def answer(events: Sequence[Event], request: str, choice: int = 0) -> list[int]:
    return [
        e.sampled.token
        for e in events
        if isinstance(e, TokenEvent) and e.request == request and e.choice == choice
    ]


def finish(events: Sequence[Event], request: str, choice: int = 0) -> FinishEvent:
    (found,) = [
        e for e in events if isinstance(e, FinishEvent) and e.request == request and e.choice == choice
    ]
    return found


def nothing_held(engine: Engine) -> bool:
    return engine.pool.counts.held == 0 and not engine.scheduler.running and not engine.scheduler.waiting


def with_seed(seed: int) -> SamplingParams:
    return dataclasses.replace(WARM, seed=seed, max_new_tokens=12)
