"""Lets a model write its own calibration text: temperature 1, seeded, from nothing and from short prompts.

Knows no files and no blocks: rows of token ids come out. Sampling is the arg max of logits plus Gumbel noise,
which is a draw from the softmax; the noise has a generator of its own, so that torch's global one is neither
read nor moved.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from quantmill.quantize.calibration import Tokenizer

BATCH = 32  # rows written together
ROW_TOKENS = 256
PROMPT = 64  # tokens of a given row that the model goes on from
TOPICS = (
    "rivers", "the moon", "sorting algorithms", "bread", "medieval trade", "vaccines", "chess", "volcanoes",
    "electric motors", "a family dinner", "birds", "tax law", "jazz", "matrices", "a long journey", "gardens",
)  # fmt: skip
FORMS = (
    "Explain {} to a beginner.",
    "Write a short story about {}.",
    "List five facts about {}.",
    "Write a Python function that has to do with {}, and explain it.",
    "Ask and answer three questions about {}.",
    "Écris un paragraphe sur ce sujet : {}.",
)


def write(model: Any, tokenizer: Tokenizer, *, tokens: int, seed: int) -> list[list[int]]:
    """Rows of ids, prompts included: at least `tokens` of them, unless the model keeps falling silent.

    A row ends with the end-of-sequence token or after ROW_TOKENS. `model` is a Transformers causal LM. Every
    other row begins with the beginning-of-sequence token alone (where the tokenizer has one), the rest with a
    prompt, in the chat template where there is one.
    """
    noise = GumbelNoise(seed)
    ends = _end_ids(model, tokenizer)
    starts = _starts(tokenizer, random.Random(seed))
    rows: list[list[int]] = []
    most_batches = 16 + 8 * tokens // (BATCH * ROW_TOKENS)
    for _ in range(most_batches):
        batch = list(islice(starts, BATCH))
        written = _continue(model, batch, noise, ends)
        rows += [start + answer for start, answer in zip(batch, written, strict=True) if len(answer) > 1]
        if sum(map(len, rows)) >= tokens:
            break
    return rows


def go_on(model: Any, rows: Tensor, copies: int, *, seed: int, at_once: int = 512) -> Tensor:
    """`copies` times as many rows as there are, of the same length, written by the model: (copies R, L) int64.

    rows: (R, L) token ids. A new row is two pieces, each some tokens of a row (at most PROMPT, taken from another
    place every time) and what the model writes after them; no piece ends early. `at_once`: pieces written
    together.
    """
    length = rows.shape[1]
    half, pieces = -(-length // 2), 2 * copies
    prompt = max(1, min(PROMPT, half // 2))
    places = [(length - prompt) * i // pieces for i in range(pieces)]
    starts = torch.cat([rows[:, at : at + prompt] for at in places]).to(model.device)
    noise, config = GumbelNoise(seed), _config(half - prompt, half - prompt, None, 0)
    # sixteen bits where they are fast: what is written need not be what float32 would have written
    fast = torch.autocast("cuda", torch.bfloat16, enabled=model.device.type == "cuda")
    with torch.inference_mode(), fast:
        written = torch.cat([_written(model, s, None, config, noise) for s in torch.split(starts, at_once)])
    first, second = written.cpu().chunk(2)
    return torch.cat([first, second], 1)[:, :length].clone()


class GumbelNoise:
    """A logits processor: adds standard Gumbel noise to (rows, vocabulary); the largest sum is a sample."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generator: torch.Generator | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._generator is None:
            self._generator = torch.Generator(scores.device).manual_seed(self._seed)
        waiting = torch.empty_like(scores, dtype=torch.float32).exponential_(generator=self._generator)
        return scores.float() - waiting.clamp_min_(2.0**-25).log()  # float32 waiting times can come out as 0


def _starts(tokenizer: Tokenizer, choose: random.Random) -> Iterator[list[int]]:
    while True:
        if tokenizer.bos_token_id is not None:
            yield [tokenizer.bos_token_id]
        form, topic = (table[int(choose.random() * len(table))] for table in (FORMS, TOPICS))
        yield _prompt(form.format(topic), tokenizer)


def _prompt(text: str, tokenizer: Tokenizer) -> list[int]:
    if not tokenizer.chat_template:
        return list(tokenizer(text, verbose=False)["input_ids"])
    turns = [{"role": "user", "content": text}]
    ids = tokenizer.apply_chat_template(turns, tokenize=True, add_generation_prompt=True, return_dict=False)
    return list(ids)


def _end_ids(model: Any, tokenizer: Tokenizer) -> list[int]:
    """Every token that ends a text, by the tokenizer's word and by the model's own generation config."""
    own = getattr(model.generation_config, "eos_token_id", None)
    several = own if isinstance(own, list) else [own]
    return sorted({end for end in [tokenizer.eos_token_id, *several] if end is not None})


def _continue(
    model: Any, starts: Sequence[list[int]], noise: GumbelNoise, ends: list[int]
) -> list[list[int]]:
    """What the model writes after each start, up to the first end token, which stays.

    Starts are padded on the left.
    """
    pad, width = ends[0] if ends else 0, max(map(len, starts))
    padded = torch.tensor([[pad] * (width - len(start)) + start for start in starts], device=model.device)
    seen = torch.tensor(
        [[0] * (width - len(start)) + [1] * len(start) for start in starts], device=model.device
    )
    written = _written(model, padded, seen, _config(ROW_TOKENS, None, ends or None, pad), noise)
    return [_cut(row, ends) for row in written[:, width:].tolist()]


def _config(most: int, least: int | None, ends: list[int] | None, pad: int) -> Any:
    """Every setting that the model's own generation config could bend is spelt out."""
    from transformers import GenerationConfig

    return GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=most,
        min_new_tokens=least,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=ends,
        pad_token_id=pad,
    )


def _written(model: Any, starts: Tensor, seen: Tensor | None, config: Any, noise: GumbelNoise) -> Tensor:
    """starts (rows, n) and what comes after them; seen (rows, n): 0 where a start is padded."""
    from transformers import LogitsProcessorList

    written: Tensor = model.generate(
        starts,
        attention_mask=torch.ones_like(starts) if seen is None else seen,
        generation_config=config,
        logits_processor=LogitsProcessorList([noise]),
    )
    return written


def _cut(row: list[int], ends: list[int]) -> list[int]:
    stop = next((at + 1 for at, token in enumerate(row) if token in ends), len(row))
    return row[:stop]
