"""Text or chats -> token blocks: seeded, fingerprinted, with a record of what was read and what was dropped.

One rule for every source: documents are tokenised in the order in which they come, with what the tokenizer
adds around each, into one stream; this is cut into blocks, block i = ids[i * seqlen : (i + 1) * seqlen];
`samples` of them are drawn without replacement and kept in the order of the text. Documents shorter than a
block thus share one, none is dropped for its length, and nothing is padded. Knows no layers, and no model
except where it is asked to let one write the text.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quantmill.errors import BadRequest, BadText
from quantmill.quantize import texts
from quantmill.quantize.documents import Chat, Document
from quantmill.types import CalibrationSet

BETWEEN = "\n\n"  # between documents where the tokenizer itself marks no beginning
POOL_CHARS = (
    4_000_000  # blocks are drawn from the first so many characters of a source (about a million tokens) ...
)
POOL_CHARS_PER_TOKEN = 16  # ... or from so many per token asked for, whichever is more
NGRAM = 16


class Tokenizer(Protocol):
    """What is used of a Transformers tokenizer."""

    bos_token_id: int | None
    eos_token_id: int | None
    chat_template: Any

    def __call__(self, text: str, *, verbose: bool = ...) -> Mapping[str, Any]: ...

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Pool:
    """The stream of tokens that blocks are cut from."""

    ids: Sequence[int]
    documents: int  # read, the dropped ones included
    dropped: int


def build(
    dataset: str,
    tokenizer: Tokenizer,
    *,
    seqlen: int,
    samples: int,
    seed: int = 0,
    model: Any = None,
    max_positions: int | None = None,
) -> CalibrationSet:
    """Make calibration blocks (samples, seqlen) int64 from a named set, a file, a hub id, or `self`.

    The same text, tokenizer and seed give the same blocks on every machine (`self` as far as the model
    computes the same). Fewer blocks come back where the text holds no more. `self` needs `model`, a
    Transformers causal LM; `max_positions` is how many tokens the model takes at once, where it says so.

    Raises BadRequest (impossible numbers, unknown data set), SourceNotFound (no file, no hub) and BadText
    (empty, not UTF-8, broken, without a known column, or shorter than one block).
    """
    _check_numbers(seqlen, samples, max_positions)
    if dataset == "self":
        source, pool = dataset, _own_words(model, tokenizer, seqlen * samples, seed)
    else:
        opened = texts.read(dataset)
        source, pool = opened.name, _pool(opened, tokenizer, seqlen * samples)
    blocks = _draw(pool.ids, seqlen, samples, seed, source)
    return CalibrationSet(blocks, source, seed, fingerprint(blocks), pool.documents, pool.dropped)


def read_text(dataset: str, tokenizer: Tokenizer | None = None, *, max_chars: int = POOL_CHARS) -> str:
    """The text of a data set as one string, to be scored: documents with an empty line between them.

    Reading stops after the document that reaches `max_chars`, so a text file comes back whole. Chats are
    written with the tokenizer's chat template. Raises what `build` raises.
    """
    if dataset == "self":
        raise BadRequest("a model cannot be scored on text of its own: use --text python-docs or a FILE")
    opened = texts.read(dataset)
    parts: list[str] = []
    chars = 0
    for document in opened.documents:
        parts += [_as_text(document, tokenizer, opened.name)] if document is not None else []
        chars += _chars(document)
        if chars >= max_chars:
            break
    if not any(parts):
        raise _no_text(opened.name)
    return BETWEEN.join(parts)


def fingerprint(blocks: Tensor) -> str:
    """sha256 of the tokens as little-endian int64, then of the shape as text: what tells two sets apart."""
    digest = hashlib.sha256(blocks.cpu().numpy().astype("<i8").tobytes())
    digest.update("x".join(map(str, blocks.shape)).encode())
    return digest.hexdigest()


def overlap(calibration_blocks: Tensor, eval_ids: Tensor) -> float:
    """Share (0 to 1) of the 16-grams in calibration blocks (samples, seqlen) that eval_ids (T,) also has.

    Near 1 the two are the same text and a score says nothing; unrelated texts share next to none.
    """
    ours = np.concatenate([_ngram_hashes(row) for row in calibration_blocks.cpu().numpy()])
    theirs = _ngram_hashes(eval_ids.cpu().numpy())
    return float(np.isin(ours, theirs).mean()) if len(ours) else 0.0


def _ngram_hashes(ids: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """A 64-bit hash of every NGRAM consecutive ids: a polynomial, modulo 2^64, in an odd base."""
    count = max(0, len(ids) - NGRAM + 1)
    words = ids.astype(np.uint64) + np.uint64(1)
    hashes = np.zeros(count, np.uint64)
    for offset in range(NGRAM):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + words[offset : offset + count]
    return hashes


def _check_numbers(seqlen: int, samples: int, max_positions: int | None) -> None:
    if seqlen < 1 or samples < 1:
        found = f"{samples} samples of {seqlen} tokens"
        raise BadRequest(f"{found}: both must be 1 or more; use --samples 128 --seqlen 2048")
    if max_positions is not None and seqlen > max_positions:
        cure = f"use --seqlen {max_positions} or less"
        raise BadRequest(f"the model takes {max_positions} tokens, not blocks of {seqlen}: {cure}")


def _own_words(model: Any, tokenizer: Tokenizer, tokens: int, seed: int) -> Pool:
    from quantmill.quantize.self_text import write

    if model is None:
        raise BadRequest("--dataset self needs the original model in memory: use --dataset python-docs")
    rows = write(model, tokenizer, tokens=tokens, seed=seed)
    return Pool([token for row in rows for token in row], len(rows), 0)


def _pool(source: texts.Source, tokenizer: Tokenizer, tokens: int) -> Pool:
    return (_running_pool if source.running else _mixed_pool)(source, tokenizer, tokens)


def _running_pool(source: texts.Source, tokenizer: Tokenizer, tokens: int) -> Pool:
    """One text, tokenised in one piece; of a long one the beginning only, if that gives enough tokens."""
    documents = list(source.documents)
    parts = [_as_text(document, tokenizer, source.name) for document in documents if document is not None]
    text = BETWEEN.join(parts)
    chars = max(POOL_CHARS, POOL_CHARS_PER_TOKEN * tokens)
    ids = _encode(text[:chars], tokenizer)
    while len(ids) < tokens and chars < len(text):
        chars *= 4
        ids = _encode(text[:chars], tokenizer)
    return Pool(ids if text.strip() else [], len(documents), len(documents) - len(parts))


def _mixed_pool(source: texts.Source, tokenizer: Tokenizer, tokens: int) -> Pool:
    """Texts of their own, one after the other, until there is enough to draw from."""
    separator = "" if _encode("", tokenizer) else BETWEEN
    ids: list[int] = []
    chars = documents = dropped = 0
    for document in source.documents:
        encoded = _encode_document(document, tokenizer, separator, source.name)
        documents, dropped = documents + 1, dropped + (encoded is None)
        ids += encoded or []
        chars += _chars(document)
        if len(ids) >= tokens and chars >= max(POOL_CHARS, POOL_CHARS_PER_TOKEN * tokens):
            break
    return Pool(ids, documents, dropped)


def _encode_document(
    document: Document | None, tokenizer: Tokenizer, separator: str, name: str
) -> list[int] | None:
    if document is None:
        return None
    if isinstance(document, str):
        return _encode(document + separator, tokenizer)
    ids: list[int] | None = _template(document, tokenizer, name, tokenize=True)
    return ids


def _encode(text: str, tokenizer: Tokenizer) -> list[int]:
    return list(tokenizer(text, verbose=False)["input_ids"])


def _as_text(document: Document, tokenizer: Tokenizer | None, name: str) -> str:
    if isinstance(document, str):
        return document
    return _template(document, tokenizer, name, tokenize=False) or ""


def _template(chat: Chat, tokenizer: Tokenizer | None, name: str, *, tokenize: bool) -> Any:
    """The chat as the model was taught to read it: ids or text; None where the template refuses its roles."""
    from jinja2 import TemplateError

    if tokenizer is None or not tokenizer.chat_template:
        cure = "use a file with a text column"
        raise BadRequest(f"{name} holds chats and the model has no chat template: {cure}")
    turns = [{"role": turn.role, "content": turn.content} for turn in chat]
    try:
        return tokenizer.apply_chat_template(turns, tokenize=tokenize, return_dict=False)
    except TemplateError:
        return None


def _chars(document: Document | None) -> int:
    if document is None or isinstance(document, str):
        return len(document or "")
    return sum(len(turn.content) for turn in document)


def _draw(ids: Sequence[int], seqlen: int, samples: int, seed: int, name: str) -> Tensor:
    """Up to `samples` blocks (samples, seqlen) int64, in the order of the text."""
    count = len(ids) // seqlen
    if not ids:
        raise _no_text(name)
    if count == 0:
        cure = f"use --seqlen {1 << (len(ids).bit_length() - 1)} or more text"
        raise BadText(f"{name} holds {len(ids)} tokens, less than one block of {seqlen}: {cure}")
    keys = random.Random(seed)
    # Ranking uniform numbers: Python promises that random() stays the same, and of no sampler that it does.
    ranked = sorted(range(count), key=[keys.random() for _ in range(count)].__getitem__)
    blocks = torch.tensor(ids[: count * seqlen], dtype=torch.int64).view(count, seqlen)
    return blocks[sorted(ranked[:samples])]


def _no_text(name: str) -> BadText:
    return BadText(f"{name} holds no usable text: give a file with text, or use --dataset python-docs")
