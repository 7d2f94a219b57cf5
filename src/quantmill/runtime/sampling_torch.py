"""sampling.py for many rows at once on a GPU (any torch device): one trip back to the processor per step.

Same parameters, same order of work, same random numbers. Sums and cumulated sums are float64, so that the shape
of a batch cannot decide a draw.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from quantmill.runtime.sampling import Mask, Sampled, SamplerState, no_finite_logit, sample_on_processor
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
    if len(logits) != len(states):
        raise ValueError(f"{len(logits)} rows of logits for {len(states)} answers")
    row = _masked(_penalised(logits.float(), states), masks)
    best, token = row.max(dim=-1)
    warm = [i for i, s in enumerate(states) if not s.greedy]
    if warm:
        some = _pick(row, warm)
        drawn = _draw([states[i] for i in warm], some, _pick(best, warm))
        token = token.index_copy(0, _index(warm, row), drawn)
    spoken = [i for i, s in enumerate(states) if s.wants_logprob]
    report = _report(_pick(logits, spoken), _pick(token, spoken), [states[i] for i in spoken])
    finite = torch.isfinite(best).long()
    return _taken(torch.stack([token, finite]).tolist(), states, dict(zip(spoken, report, strict=True)))


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
    return torch.tensor(rows, dtype=torch.long, device=like.device)


def _pick(rows: Tensor, wanted: list[int]) -> Tensor:
    """These rows; no copy where they are all."""
    return rows if len(wanted) == len(rows) else rows.index_select(0, _index(wanted, rows))


def _column(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]


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
        at = (_to(rows, logits), _to(ids, logits))
        values, by = logits[at], _to(factor, logits)
        logits[at] = torch.where(values > 0, values / by, values * by) - _to(less, logits)
    rows = np.concatenate([np.full(len(s.bias_ids), i) for i, s in busy])
    if len(rows):
        ids, bias = (np.concatenate([getattr(s, name) for _, s in busy]) for name in ("bias_ids", "bias"))
        logits.index_put_((_to(rows, logits), _to(ids, logits)), _to(bias, logits), accumulate=True)
    return logits


def _lessening(params: SamplingParams, counts: np.ndarray) -> np.ndarray:
    less = params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
    return np.asarray(less, np.float32)


def _to(array: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(array).to(like.device, non_blocking=True)


def _masked(logits: Tensor, masks: Sequence[Mask | None] | None) -> Tensor:
    held = [(i, m) for i, m in enumerate(masks or ()) if m is not None]
    if not held:
        return logits
    allowed = _to(np.stack([m for _, m in held]), logits)
    rows = [i for i, _ in held]
    return logits.index_copy(0, _index(rows, logits), _pick(logits, rows).masked_fill(~allowed, _NONE))


def _draw(states: list[SamplerState], row: Tensor, best: Tensor) -> Tensor:
    """Temperature above 0: scale, filter, walk the cumulated weights -> (rows,) tokens."""
    params = [s.params for s in states]
    z = (row - best[:, None]) * _column([1 / max(p.temperature, 1e-6) for p in params], row)
    z = _typical(_min_p(_top_k_p(z, params), params), params)
    cumulated = z.exp().cumsum(dim=-1, dtype=torch.float64)
    total = cumulated[:, -1:]
    uniform = torch.tensor([s.uniform() for s in states], dtype=torch.float64, device=row.device)[:, None]
    target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulated, target, right=True)[:, 0].clamp_(max=row.shape[1] - 1)


def _top_k_p(z: Tensor, params: list[SamplingParams]) -> Tensor:
    """top_k, then top_p. One sorted list of the highest values serves both: short where every row has a top_k."""
    vocab = z.shape[1]
    ks = [p.top_k if 0 < p.top_k < vocab else vocab for p in params]
    nucleus = any(p.top_p < 1 for p in params)
    if not nucleus and min(ks) == vocab:
        return z
    depth = max((k for k, p in zip(ks, params, strict=True) if k < vocab or p.top_p < 1), default=1)
    high = torch.topk(z, min(vocab, depth + _SPARE), dim=-1).values
    kth = high.gather(1, torch.tensor([[min(k, high.shape[1]) - 1] for k in ks], device=z.device))
    kth = torch.where(torch.tensor([[k < vocab] for k in ks], device=z.device), kth, _NONE)
    z = z.masked_fill(z < kth, _NONE)
    if not nucleus:
        return z
    reached = high.masked_fill(high < kth, _NONE).exp().cumsum(dim=-1, dtype=torch.float64)
    total = z.exp().sum(dim=-1, keepdim=True, dtype=torch.float64)
    share = _column([p.top_p for p in params], z).double() * total
    cut = torch.searchsorted(reached, share).clamp_(max=high.shape[1] - 1)
    lowest = torch.where(_column([p.top_p for p in params], z) < 1, high.gather(1, cut), _NONE)
    return z.masked_fill(z < lowest, _NONE)


def _min_p(z: Tensor, params: list[SamplingParams]) -> Tensor:
    if all(p.min_p == 0 for p in params):
        return z
    return z.masked_fill(z < _column([p.min_p for p in params], z).log(), _NONE)


def _typical(z: Tensor, params: list[SamplingParams]) -> Tensor:
    """The tokens whose surprise is nearest to the entropy."""
    if all(p.typical_p >= 1 for p in params):
        return z
    surprise = -z.log_softmax(dim=-1)
    p = surprise.neg().exp()
    entropy = torch.where(p > 0, p * surprise, 0).sum(dim=-1, keepdim=True)
    distance = (surprise - entropy).abs()
    ordered, order = distance.sort(dim=-1, stable=True)
    mass = _column([q.typical_p for q in params], z).double()
    cut = torch.searchsorted(p.gather(1, order).cumsum(dim=-1, dtype=torch.float64), mass)
    farthest = ordered.gather(1, cut.clamp_(max=z.shape[1] - 1))
    out = (distance > farthest) & (mass < 1)
    return z.masked_fill(out, _NONE)


def _report(logits: Tensor, token: Tensor, states: list[SamplerState]) -> list[Sampled]:
    """Log probabilities of the drawn tokens and of the likeliest ones."""
    if not states:
        return []
    norm = logits.float().logsumexp(dim=-1)
    said = (logits.float().gather(1, token[:, None])[:, 0] - norm).tolist()
    most = max(1, max(s.params.logprobs or 0 for s in states))
    values, ids = torch.topk(logits.float(), most, dim=-1)
    tops = zip((values - norm[:, None]).tolist(), ids.tolist(), strict=True)
    out = []
    for state, drawn, logprob, (high, which) in zip(states, token.tolist(), said, tops, strict=True):
        count = state.params.logprobs or 0
        out.append(Sampled(drawn, logprob, tuple(zip(which[:count], high[:count], strict=True))))
    return out
