"""sampling.py for many rows at once on a GPU (any torch device): one trip back to the processor per step.

Same parameters, same order of work, same random numbers. Sums and cumulated sums are float64, so that the shape
of a batch cannot decide a draw. Nothing waits for the GPU before the tokens are wanted: what it needs comes by
copies from pinned memory, in line with its work.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from quantmill.runtime.sampling import (
    Drawing,
    Mask,
    Sampled,
    SamplerState,
    no_finite_logit,
    sample_on_processor,
)
from quantmill.types import SamplingParams

_SPARE = 64  # values taken beyond the k-th: ties with it, which float16 heads have
_NONE = float("-inf")
log = logging.getLogger(__name__)


def sample_rows(
    logits: Tensor, states: Sequence[SamplerState], masks: Sequence[Mask | None] | None = None
) -> list[Sampled]:
    """Draw the next token of every answer and note it in its state.

    logits: (rows, vocab) float32, left as it is. Raises QuantmillError where a row has no finite logit.
    """
    return begin_rows(logits, states, masks)()


def begin_rows(
    logits: Tensor, states: Sequence[SamplerState], masks: Sequence[Mask | None] | None = None
) -> Drawing:
    """`sample_rows` up to where it would wait for the device. What is returned waits, and gives the tokens."""
    if len(logits) != len(states):
        raise ValueError(f"{len(logits)} rows of logits for {len(states)} answers")
    states = list(states)
    row = _masked(_penalised(logits.float(), states), masks)
    best, token = row.max(dim=-1)
    warm = [i for i, s in enumerate(states) if not s.greedy]
    if warm:
        some = picked_rows(row, warm)
        drawn = _draw([states[i] for i in warm], some, picked_rows(best, warm))
        token = drawn if len(warm) == len(states) else token.index_copy(0, _index(warm, row), drawn)
    spoken = [i for i, s in enumerate(states) if s.wants_logprob]
    report = _report(picked_rows(logits, spoken), picked_rows(token, spoken), [states[i] for i in spoken])
    found = _fetch(torch.stack([token, torch.isfinite(best).long()]))
    return lambda: _taken(found().tolist(), states, dict(zip(spoken, report(), strict=True)))


@cache
def trusted(device: torch.device) -> bool:
    """Whether this device draws as the processor does, tried once with parameters of every kind.

    Where it does not, or cannot, `sampling.sample_rows` brings the logits to the processor and says so.
    """
    rng = np.random.default_rng(1)
    params = [SamplingParams(0.0, repetition_penalty=1.0, logprobs=2), SamplingParams(top_k=0, top_p=0.7)]
    params += [SamplingParams(min_p=0.05, presence_penalty=0.5), SamplingParams(top_p=1.0, typical_p=0.8)]
    params = [replace(p, seed=i, logit_bias={3: 1.0}) for i, p in enumerate(params)]
    here, there = ([SamplerState(p, (1, 2, 3)) for p in params] for _ in range(2))
    masks = [None, None, rng.random(999) < 0.9, None]
    try:
        for _ in range(4):
            logits = rng.normal(0, 3, (len(params), 999)).astype(np.float32)
            ours = sample_on_processor(logits, here, masks)
            theirs = sample_rows(torch.from_numpy(logits).to(device), there, masks)
            if [s.token for s in ours] != [s.token for s in theirs]:
                log.warning("sampling on %s differs from the processor's, which is used instead", device)
                return False
    except RuntimeError as error:  # what torch raises for kernels that fail
        log.warning("sampling on %s fails (%s); the processor's is used instead", device, error)
        return False
    return True


def _fetch(there: Tensor) -> Callable[[], Tensor]:
    """A device's tensor on its way to the host; calling what is returned waits for it."""
    if there.device.type != "cuda":
        return lambda: there.cpu()
    here = torch.empty(there.shape, dtype=there.dtype, pin_memory=True)
    here.copy_(there, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()

    def wait() -> Tensor:
        event.synchronize()
        return here

    return wait


def _taken(
    found: list[list[int]], states: Sequence[SamplerState], report: dict[int, Sampled]
) -> list[Sampled]:
    tokens, finite = found
    if not all(finite):
        raise no_finite_logit()
    for token, state in zip(tokens, states, strict=True):
        state.accept(token)
    return [report.get(i) or Sampled(token) for i, token in enumerate(tokens)]


def _index(rows: list[int], like: Tensor) -> Tensor:
    return _to(np.array(rows, np.int64), like)


def picked_rows(rows: Tensor, wanted: list[int]) -> Tensor:
    """These rows; no copy where they are all."""
    return rows if len(wanted) == len(rows) else rows.index_select(0, _index(wanted, rows))


def _penalised(logits: Tensor, states: Sequence[SamplerState]) -> Tensor:
    """Repetition, presence and frequency penalties and the bias, all rows in a few scattered operations."""
    busy = [(i, s) for i, s in enumerate(states) if not s.plain]
    if not busy:
        return logits
    logits = logits.clone()
    seen = [(i, s.params, *s.seen) for i, s in busy]
    rows = np.concatenate([np.full(len(ids), i) for i, _, ids, _ in seen])
    if len(rows):
        ids = np.concatenate([ids for _, _, ids, _ in seen])
        factor = np.concatenate([np.full(len(x), p.repetition_penalty, np.float32) for _, p, x, _ in seen])
        less = np.concatenate([_lessening(p, counts) for _, p, _, counts in seen])
        places = _to(np.stack([rows, ids]), logits)
        by, lower = _to(np.stack([factor, less]), logits).unbind(0)
        at = (places[0], places[1])
        values = logits[at]
        logits[at] = torch.where(values > 0, values / by, values * by) - lower
    rows = np.concatenate([np.full(len(s.bias_ids), i) for i, s in busy])
    if len(rows):
        ids, bias = (np.concatenate([getattr(s, name) for _, s in busy]) for name in ("bias_ids", "bias"))
        logits.index_put_((_to(rows, logits), _to(ids, logits)), _to(bias, logits), accumulate=True)
    return logits


def _lessening(params: SamplingParams, counts: np.ndarray) -> np.ndarray:
    less = params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
    return np.asarray(less, np.float32)


def _to(array: np.ndarray, like: Tensor) -> Tensor:
    """A copy on the tensor's device. From pinned memory: no other kind of copy lets the host go on at once."""
    here = torch.from_numpy(array)
    return here.pin_memory().to(like.device, non_blocking=True) if like.device.type == "cuda" else here


def _masked(logits: Tensor, masks: Sequence[Mask | None] | None) -> Tensor:
    held = [(i, m) for i, m in enumerate(masks or ()) if m is not None]
    if not held:
        return logits
    allowed = _to(np.stack([m for _, m in held]), logits)
    rows = [i for i, _ in held]
    return logits.index_copy(0, _index(rows, logits), picked_rows(logits, rows).masked_fill(~allowed, _NONE))


def _draw(states: list[SamplerState], row: Tensor, best: Tensor) -> Tensor:
    """Temperature above 0: scale, filter, walk the cumulated weights -> (rows,) tokens."""
    numbers = _Numbers.of(states, row)
    z = (row - best[:, None]) * numbers.sharpness.float()
    z = _typical(_min_p(_top_k_p(z, numbers), numbers), numbers)
    cumulated = z.exp().cumsum(dim=-1, dtype=torch.float64)
    total = cumulated[:, -1:]
    target = torch.minimum(numbers.uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulated, target, right=True)[:, 0].clamp_(max=row.shape[1] - 1)


@dataclass(frozen=True, slots=True)
class _Numbers:
    """The rows' parameters on the device, each (rows, 1) float64. One copy brings them all."""

    params: list[SamplingParams]
    sharpness: Tensor  # 1 / temperature
    top_k: Tensor  # the vocabulary: off
    top_p: Tensor
    min_p: Tensor  # its logarithm; minus infinity: off
    typical_p: Tensor
    uniform: Tensor  # the random numbers of this draw

    @classmethod
    def of(cls, states: list[SamplerState], row: Tensor) -> _Numbers:
        vocab = row.shape[1]
        table = np.array([(*_row_of(s.params, vocab), s.uniform()) for s in states])
        return cls([s.params for s in states], *_to(np.ascontiguousarray(table.T), row)[:, :, None].unbind(0))


def _row_of(params: SamplingParams, vocab: int) -> tuple[float, ...]:
    """The columns of `_Numbers` but the last."""
    top_k = params.top_k if 0 < params.top_k < vocab else vocab
    least = math.log(params.min_p) if params.min_p > 0 else _NONE
    return 1 / max(params.temperature, 1e-6), top_k, params.top_p, least, params.typical_p


def _top_k_p(z: Tensor, numbers: _Numbers) -> Tensor:
    """top_k, then top_p. One sorted list of the highest values serves both: short where every row has a top_k."""
    vocab, params = z.shape[1], numbers.params
    ks = [p.top_k if 0 < p.top_k < vocab else vocab for p in params]
    nucleus = any(p.top_p < 1 for p in params)
    if not nucleus and min(ks) == vocab:
        return z
    depth = max((k for k, p in zip(ks, params, strict=True) if k < vocab or p.top_p < 1), default=1)
    high = torch.topk(z, min(vocab, depth + _SPARE), dim=-1).values
    kth = high.gather(1, numbers.top_k.long().clamp(max=high.shape[1]) - 1)
    kth = torch.where(numbers.top_k < vocab, kth, _NONE)
    z = z.masked_fill(z < kth, _NONE)
    if not nucleus:
        return z
    reached = high.masked_fill(high < kth, _NONE).exp().cumsum(dim=-1, dtype=torch.float64)
    total = z.exp().sum(dim=-1, keepdim=True, dtype=torch.float64)
    cut = torch.searchsorted(reached, numbers.top_p * total).clamp_(max=high.shape[1] - 1)
    lowest = torch.where(numbers.top_p < 1, high.gather(1, cut), _NONE)
    return z.masked_fill(z < lowest, _NONE)


def _min_p(z: Tensor, numbers: _Numbers) -> Tensor:
    if all(p.min_p == 0 for p in numbers.params):
        return z
    return z.masked_fill(z < numbers.min_p.float(), _NONE)


def _typical(z: Tensor, numbers: _Numbers) -> Tensor:
    """The tokens whose surprise is nearest to the entropy."""
    if all(p.typical_p >= 1 for p in numbers.params):
        return z
    surprise = -z.log_softmax(dim=-1)
    p = surprise.neg().exp()
    entropy = torch.where(p > 0, p * surprise, 0).sum(dim=-1, keepdim=True)
    distance = (surprise - entropy).abs()
    ordered, order = distance.sort(dim=-1, stable=True)
    mass = numbers.typical_p
    cut = torch.searchsorted(p.gather(1, order).cumsum(dim=-1, dtype=torch.float64), mass)
    farthest = ordered.gather(1, cut.clamp_(max=z.shape[1] - 1))
    out = (distance > farthest) & (mass < 1)
    return z.masked_fill(out, _NONE)


def _report(logits: Tensor, token: Tensor, states: list[SamplerState]) -> Callable[[], list[Sampled]]:
    """Log probabilities of the drawn tokens and of the likeliest ones."""
    if not states:
        return list
    norm = logits.float().logsumexp(dim=-1)
    said = logits.float().gather(1, token[:, None])[:, 0] - norm
    most = max(1, max(s.params.logprobs or 0 for s in states))
    values, ids = torch.topk(logits.float(), most, dim=-1)
    parts = [_fetch(x) for x in (token, said, values - norm[:, None], ids)]

    def told() -> list[Sampled]:
        out = []
        lists = [part().tolist() for part in parts]
        for state, drawn, logprob, high, which in zip(states, *lists, strict=True):
            count = state.params.logprobs or 0
            out.append(Sampled(drawn, logprob, tuple(zip(which[:count], high[:count], strict=True))))
        return out

    return told
