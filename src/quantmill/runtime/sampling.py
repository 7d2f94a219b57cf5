"""Logits of one position -> the next token, in numpy. Knows no model, no cache and no text.

The order of work is Transformers': penalties, bias, mask, temperature, then the filters top_k, top_p, min_p and
typical_p, each on what the one before has left. A filter keeps whole ties, so that no result depends on how a sort
breaks them. The draw walks the kept tokens in the order of their ids.

Random numbers are a function of (seed, choice, position in the answer) and of nothing else: an answer is the same
alone, in any batch, and after it was put aside and taken up again. sampling_torch.py does the same on a GPU.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantmill.errors import BadRequest, QuantmillError
from quantmill.types import SamplingParams

Row = NDArray[np.float32]  # (vocab,) logits
Mask = NDArray[np.bool_]  # (vocab,), True where a token is allowed
Drawing = Callable[[], "list[Sampled]"]  # a draw under way: waits for it

BLOCK, COLUMNS = 64, 1024  # how rows as wide as a vocabulary are cut where that saves looking at all of it
NUCLEUS = 256  # tokens that a top_p is first looked for among
_M64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Sampled:
    """A drawn token. Log probabilities are the model's own: before penalties, bias, mask and temperature."""

    token: int
    logprob: float | None = None  # where the parameters ask for it
    top: tuple[tuple[int, float], ...] = ()  # (token, log probability), likeliest first


class SamplerState:
    """What one answer remembers from token to token: its parameters, what was said, its random numbers.

    `choice` tells the answers to one request apart: each has its own random numbers. Without a seed one is drawn.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int] = (), choice: int = 0) -> None:
        self.params = params
        self.seed = secrets.randbits(63) if params.seed is None else params.seed
        self.step = 0  # tokens drawn
        self._stream = _mix(_mix(self.seed & _M64) ^ choice)  # the same for all steps
        self.wants_logprob = params.logprobs is not None or (params.best_of or params.n) > params.n
        self.greedy = params.temperature == 0
        self.bias_ids = np.fromiter(params.logit_bias.keys(), np.int64, len(params.logit_bias))
        self.bias = np.fromiter(params.logit_bias.values(), np.float32, len(params.logit_bias))
        self._counted = (
            params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
        )
        self._index: dict[int, int] = {}
        self._ids = np.zeros(64, np.int64)
        self._counts = np.zeros(64, np.float32)
        if self._counted and params.repetition_penalty != 1:
            for token in prompt_ids:
                self._slot(int(token))

    @property
    def plain(self) -> bool:
        """The logits go to the draw as they are."""
        return not (self._index or len(self.bias))

    @property
    def seen(self) -> tuple[NDArray[np.int64], Row]:
        """Tokens that penalties apply to, and how often the answer has each (0: only the prompt has it)."""
        n = len(self._index)
        return self._ids[:n], self._counts[:n]

    def uniform(self) -> float:
        """The random number in [0, 1) of the next token."""
        return (_mix(self._stream ^ self.step) >> 11) * 2.0**-53

    def accept(self, token: int) -> None:
        """Note that `token` is the next of the answer."""
        self.step += 1
        if self._counted:
            slot = self._slot(token)  # may replace the arrays
            self._counts[slot] += 1

    def _slot(self, token: int) -> int:
        slot = self._index.setdefault(token, len(self._index))
        if slot == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[slot] = token
        return slot


def check_tokens(params: SamplingParams, vocab_size: int) -> None:
    """Raises BadRequest where the parameters name tokens that the model does not have."""
    for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
        for token in ids:
            if not 0 <= token < vocab_size:
                raise BadRequest(f"{name} names token {token}; the vocabulary ends at {vocab_size - 1}")


def sample(logits: Row, state: SamplerState, *, mask: Mask | None = None) -> Sampled:
    """Draw the next token of an answer and note it in `state`.

    logits: (vocab,) float32, left as it is. Raises QuantmillError where no token has a finite logit.
    """
    if not state.wants_logprob:
        return Sampled(_draw(logits, state, mask))
    logprob, top = _log_probabilities(logits, state.params.logprobs or 0)
    token = _draw(logits, state, mask)
    return Sampled(token, float(logprob(token)), top)


def sample_rows(
    logits: Any, states: Sequence[SamplerState], masks: Sequence[Mask | None] | None = None
) -> list[Sampled]:
    """`sample` for every row of (rows, vocab) logits: numpy here, torch tensors in sampling_torch.py."""
    return begin_rows(logits, states, masks)()


def begin_rows(
    logits: Any, states: Sequence[SamplerState], masks: Sequence[Mask | None] | None = None
) -> Drawing:
    """`sample_rows` in two halves: what is returned gives the tokens when it is called. A GPU draws meanwhile."""
    if not isinstance(logits, np.ndarray):
        from quantmill.runtime import sampling_torch

        if sampling_torch.trusted(logits.device):
            return sampling_torch.begin_rows(logits, states, masks)
        logits = logits.float().cpu().numpy()
    return lambda: sample_on_processor(logits, states, masks)


def picked_rows(logits: Any, rows: list[int]) -> Any:
    """These rows of logits, where they are. A GPU is not waited for."""
    if isinstance(logits, np.ndarray):
        return logits[rows]
    from quantmill.runtime import sampling_torch

    return sampling_torch.picked_rows(logits, rows)


def sample_on_processor(
    logits: Row, states: Sequence[SamplerState], masks: Sequence[Mask | None] | None = None
) -> list[Sampled]:
    """`sample` row by row."""
    masks = masks or [None] * len(states)
    return [sample(row, state, mask=mask) for row, state, mask in zip(logits, states, masks, strict=True)]


def no_finite_logit() -> QuantmillError:
    return QuantmillError(
        "the model gave no finite logit for the next token: try --cpu-exact, or quantmill check"
    )


def _draw(logits: Row, state: SamplerState, mask: Mask | None) -> int:
    row = logits if state.plain else _penalised(logits, state)
    if mask is not None:
        row = np.where(mask, row, np.float32(-np.inf))
    token = int(row.argmax())
    if not np.isfinite(row[token]):  # argmax finds a NaN, and minus infinity only where there is nothing else
        raise no_finite_logit()
    if not state.greedy:
        token = _draw_warm(row, float(row[token]), state)
    state.accept(token)
    return token


def _draw_warm(row: Row, best: float, state: SamplerState) -> int:
    z = (row - np.float32(best)) * np.float32(1 / max(state.params.temperature, 1e-6))
    ids: NDArray[np.int64] | None = None
    for keep_rule in FILTERS:
        keep = keep_rule(z, state.params)
        if keep is not None:
            chosen = np.flatnonzero(keep)
            ids = chosen if ids is None else ids[chosen]
            z = z[chosen]
    place = _walk(np.exp(z), state.uniform())
    return place if ids is None else int(ids[place])


def _walk(weights: Row, uniform: float) -> int:
    """The first place where the cumulated weights exceed `uniform` of their sum; block by block, as there may
    be very many."""
    blocks, tail = divmod(len(weights), BLOCK)
    sums = weights[: blocks * BLOCK].reshape(blocks, BLOCK).sum(axis=1)
    cumulated = np.append(sums, weights[blocks * BLOCK :].sum()).cumsum(dtype=np.float64)
    target = min(uniform * cumulated[-1], np.nextafter(cumulated[-1], 0))
    block = int(cumulated.searchsorted(target, side="right"))
    begin = block * BLOCK
    within = weights[begin : begin + (BLOCK if block < blocks else tail)].cumsum(dtype=np.float64)
    rest = target - (cumulated[block - 1] if block else 0.0)
    rest = min(rest, np.nextafter(within[-1], 0))  # the block's sum was rounded differently
    return begin + int(within.searchsorted(rest, side="right"))


def _kth_largest(values: Row, k: int) -> np.float32:
    """Of very many values, found among few: k of the columns' peaks are no larger than it."""
    rows = len(values) // COLUMNS
    if rows < 2 or 2 * k > COLUMNS:
        return np.float32(np.partition(values, len(values) - k)[len(values) - k])
    peaks = values[: rows * COLUMNS].reshape(rows, COLUMNS).max(axis=0)
    floor = np.partition(peaks, COLUMNS - k)[COLUMNS - k]
    few = values[np.flatnonzero(values >= floor)]
    return np.float32(np.partition(few, len(few) - k)[len(few) - k])


def _penalised(logits: Row, state: SamplerState) -> Row:
    params, row = state.params, logits.copy()
    ids, counts = state.seen
    values = row[ids]
    values = np.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    values -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
    row[ids] = values
    row[state.bias_ids] += state.bias
    return row


def _top_k(z: Row, params: SamplingParams) -> Mask | None:
    if not 0 < params.top_k < len(z):
        return None
    return np.asarray(z >= _kth_largest(z, params.top_k))


def _top_p(z: Row, params: SamplingParams) -> Mask | None:
    """The fewest tokens whose probabilities reach top_p."""
    if params.top_p >= 1:
        return None
    weights = np.exp(z)
    total = float(weights.sum(dtype=np.float64))
    high = np.sort(_likeliest(weights, params.top_p, total))[::-1]
    cumulated = high.cumsum(dtype=np.float64)
    cut = int(cumulated.searchsorted(params.top_p * total))
    return np.asarray(weights >= high[min(cut, len(high) - 1)])


def _likeliest(weights: Row, top_p: float, total: float) -> Row:
    """A set of weights that surely holds the nucleus, as few as can be found without sorting."""
    if len(weights) <= NUCLEUS:
        return weights
    few = weights[np.flatnonzero(weights >= _kth_largest(weights, NUCLEUS))]
    if few.sum(dtype=np.float64) >= top_p * total:
        return few
    # All below this share weigh less than 1 - top_p together.
    return weights[weights >= (1 - top_p) / len(weights) * total]


def _min_p(z: Row, params: SamplingParams) -> Mask | None:
    return np.asarray(z >= np.float32(np.log(params.min_p))) if params.min_p > 0 else None


def _typical(z: Row, params: SamplingParams) -> Mask | None:
    """Locally typical sampling: the tokens whose surprise is nearest to the entropy (Meister et al., 2022)."""
    if params.typical_p >= 1:
        return None
    weights = np.exp(z)
    total = weights.sum(dtype=np.float64)
    p = weights / np.float32(total)
    surprise = np.float32(np.log(total)) - z
    entropy = (p * np.where(weights > 0, surprise, 0)).sum()
    distance = np.abs(surprise - entropy)
    order = np.argsort(distance, kind="stable")
    cut = int(p[order].cumsum(dtype=np.float64).searchsorted(params.typical_p))
    return np.asarray(distance <= distance[order[min(cut, len(order) - 1)]])


FILTERS: tuple[Callable[[Row, SamplingParams], Mask | None], ...] = (_top_k, _top_p, _min_p, _typical)


def _log_probabilities(
    logits: Row, count: int
) -> tuple[Callable[[int], float], tuple[tuple[int, float], ...]]:
    """A function token -> log probability, and the `count` likeliest tokens."""
    best = float(logits.max())
    norm = best + float(np.log(np.exp(logits - np.float32(best)).sum(dtype=np.float64)))
    top: tuple[tuple[int, float], ...] = ()
    if count:
        count = min(count, len(logits))
        high = np.flatnonzero(logits >= _kth_largest(logits, count))
        order = high[np.lexsort((high, -logits[high]))][:count]
        top = tuple((int(t), float(logits[t]) - norm) for t in order)
    return lambda token: float(logits[token]) - norm, top


def score(logits: Row, token: int, count: int) -> Sampled:
    """The log probability of a token that is given, and the `count` likeliest: for scoring prompts."""
    logprob, top = _log_probabilities(logits, count)
    return Sampled(token, logprob(token), top)


def _mix(value: int) -> int:
    """The output function of SplitMix64 (Steele, Lea and Flood, 2014): every bit depends on every bit."""
    value = (value + 0x9E3779B97F4A7C15) & _M64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _M64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _M64
    return value ^ (value >> 31)
