"""Log probabilities in the two shapes that OpenAI's API has for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from quantmill.errors import BadRequest
from quantmill.runtime.sampling import Sampled
from quantmill.runtime.tokenizer import TextTokenizer
from quantmill.types import Json

LOWEST = -9999.0  # JSON knows no infinity


def token_bytes(token: int, tokenizer: TextTokenizer) -> bytes:
    """What a token stands for; nothing for those beyond the tokenizer (a padded vocabulary)."""
    try:
        return tokenizer.token_bytes(token)
    except BadRequest:
        return b""


def chat_logprobs(tokens: Iterable[Sampled], tokenizer: TextTokenizer) -> Json:
    """{"content": [...]}: one entry for each token."""

    def entry(token: int, logprob: float) -> Json:
        raw = token_bytes(token, tokenizer)
        text = raw.decode("utf-8", "replace")
        return {"token": text, "logprob": max(logprob, LOWEST), "bytes": list(raw)}

    content = [
        entry(s.token, s.logprob or 0.0) | {"top_logprobs": [entry(t, p) for t, p in s.top]} for s in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokens: Sequence[Sampled], tokenizer: TextTokenizer, offset: int = 0, first: int | None = None
) -> Json:
    """Four lists. `first`: a prompt's first token, which has no probability; `offset`: characters before."""
    texts = [token_bytes(s.token, tokenizer).decode("utf-8", "replace") for s in tokens]
    probabilities: list[float | None] = [max(s.logprob or 0.0, LOWEST) for s in tokens]
    tops: list[Json | None] = [_top(s, tokenizer) for s in tokens]
    if first is not None:
        texts.insert(0, token_bytes(first, tokenizer).decode("utf-8", "replace"))
        probabilities.insert(0, None)
        tops.insert(0, None)
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": probabilities,
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def _top(sampled: Sampled, tokenizer: TextTokenizer) -> Json:
    """The likeliest tokens by text. Of tokens with one text the likeliest counts."""
    found: Json = {}
    for token, logprob in sampled.top:
        found.setdefault(token_bytes(token, tokenizer).decode("utf-8", "replace"), max(logprob, LOWEST))
    return found
