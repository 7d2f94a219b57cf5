"""Decoding that feeds itself: every step draws its tokens on the GPU, and the host reads them one step late."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from quantmill.errors import BadRequest
from quantmill.runtime.gpu import drawing
from quantmill.runtime.gpu.drawing import RING
from quantmill.runtime.gpu.steps import Kind, Steps, bucket_of
from quantmill.runtime.interface import PAGE, Piece, Runtime
from quantmill.runtime.sampling import SamplerState
from quantmill.types import SamplingParams

HALF = RING // 2  # lines of random numbers that are sent at once


def can_stream(params: SamplingParams) -> bool:
    """Whether the GPU alone can draw by these parameters: greedy, or temperature, top_k and top_p."""
    plain = SamplingParams(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        repetition_penalty=1.0,
        max_new_tokens=params.max_new_tokens,
        seed=params.seed,
        stop=params.stop,
        stop_token_ids=params.stop_token_ids,
        ignore_eos=params.ignore_eos,
        n=params.n,
    )
    return plain == params


def stream(
    runtime: Runtime, steps: Steps, pieces: Sequence[Piece], states: Sequence[SamplerState], most: int
) -> Iterator[list[int]]:
    """See GpuRuntime.stream."""
    _check(runtime, pieces, states, most)
    rows, bucket = len(pieces), bucket_of(len(pieces))
    starts = [s.step for s in states]
    with torch.inference_mode():
        steps.ready(bucket, Kind.DRAWING)
        logits = runtime.forward(pieces).clone()
        _begin(steps, pieces, states, bucket)
        _send_numbers(steps, states, starts, 0)
        drawing.draw(logits, steps.draws, steps.inputs.rows(rows))
    reader = _Reader(steps.draws.drawn, rows)
    for number in range(most):
        with torch.inference_mode():
            reader.ask(number)
            if number + 1 < most:
                if number % HALF == 0:
                    _send_numbers(steps, states, starts, number + HALF)
                steps.replay(bucket, Kind.DRAWING)
        tokens = reader.answer()
        for state, token in zip(states, tokens, strict=True):
            state.accept(token)
        yield tokens


class _Reader:
    """Drawn tokens on their way to the host."""

    def __init__(self, drawn: Tensor, rows: int) -> None:
        self._drawn, self._rows = drawn, rows
        self._pinned = drawn.device.type == "cuda"
        self._asked: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def ask(self, number: int) -> None:
        """Send for the tokens of draw `number`, without waiting."""
        there = self._drawn[number % RING, : self._rows]
        if not self._pinned:
            self._asked.append((there.clone(), None))
            return
        here = torch.empty(self._rows, dtype=torch.int32, pin_memory=True)
        here.copy_(there, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._asked.append((here, event))

    def answer(self) -> list[int]:
        """The tokens asked for longest ago, once they are here."""
        here, event = self._asked.popleft()
        if event is not None:
            event.synchronize()
        found: list[int] = here.tolist()
        return found


def _begin(steps: Steps, pieces: Sequence[Piece], states: Sequence[SamplerState], bucket: int) -> None:
    """Pages, positions and parameters of the answers onto the GPU."""
    steps.inputs.send([Piece([0], p.start + len(p.tokens) - 1, p.pages) for p in pieces], bucket)
    draws, params = steps.draws, [s.params for s in states]
    rows = slice(0, len(states))
    vocab = 1 << 30
    sharpness = [0.0 if p.temperature == 0 else 1 / max(p.temperature, 1e-6) for p in params]
    draws.sharpness[rows] = torch.tensor(sharpness, device=draws.sharpness.device)
    draws.top_ks[rows] = torch.tensor([p.top_k or vocab for p in params], dtype=torch.int32).to(draws.top_ks)
    draws.top_ps[rows] = torch.tensor([p.top_p for p in params]).to(draws.top_ps)
    draws.steps.zero_()


def _send_numbers(steps: Steps, states: Sequence[SamplerState], starts: Sequence[int], first: int) -> None:
    """Random numbers for the stream's draws `first` ... `first + HALF - 1`. `starts`: of each answer, before it."""
    if all(s.greedy for s in states):
        return
    numbers = torch.zeros(HALF, len(states))
    for column, (state, start) in enumerate(zip(states, starts, strict=True)):
        if not state.greedy:
            numbers[:, column] = torch.tensor([_number(state, start + first + i) for i in range(HALF)])
    there, at = steps.draws.uniforms, first % RING
    there[at : at + HALF, : len(states)] = numbers.to(there.device)


def _number(state: SamplerState, step: int) -> float:
    """The random number that an answer's token `step` will be drawn with."""
    then = copy.copy(state)
    then.step = step
    return then.uniform()


def _check(runtime: Runtime, pieces: Sequence[Piece], states: Sequence[SamplerState], most: int) -> None:
    if not 0 < len(pieces) <= runtime.facts.max_pieces or len(states) != len(pieces):
        raise BadRequest(
            f"a stream takes 1 to {runtime.facts.max_pieces} prompts, each with its sampler's state"
        )
    for piece, state in zip(pieces, states, strict=True):
        if not can_stream(state.params) or not state.plain or state.wants_logprob:
            raise BadRequest(
                "a stream draws by temperature, top_k and top_p alone: use forward and a sampler"
            )
        end = piece.start + len(piece.tokens) + most - 1
        if end > min(runtime.facts.context, len(piece.pages) * PAGE):
            raise BadRequest(f"prompt and answer may take {end} tokens: give pages and a context for so many")
