"""Text in, text out, through Transformers' `generate`, with streaming that never splits a character.

Takes a model and a tokenizer that are loaded. Knows no file, no terminal and no conversation.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from quantmill.errors import BadRequest
from quantmill.types import SamplingParams

OnText = Callable[[str], None]
Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}

_BROKEN = "\ufffd"  # what a decoder shows for bytes that are no character, or not yet
_LONGEST_PART = 16  # tokens held back for one character; four bytes are the most that UTF-8 needs


@dataclass(frozen=True, slots=True)
class Generation:
    """An answer and what it cost."""

    text: str
    prompt_tokens: int
    completion_tokens: int  # the one that ended it included
    seconds: float  # the prompt's time included
    stopped: bool = True  # False: cut off by max_new_tokens or the model's context

    @property
    def tok_s(self) -> float:
        return self.completion_tokens / self.seconds if self.seconds else 0.0


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    params: SamplingParams | None = None,
    *,
    on_text: OnText | None = None,
    chat: bool = True,
) -> Generation:
    """Continue `prompt`, or answer it where `chat` and the tokenizer has a chat template.

    `on_text` gets the answer piece by piece as it comes, whole characters only; the pieces joined are
    `.text`. Temperature 0 is greedy; with a seed the same call gives the same text. Ends at any
    end-of-sequence token that the generation config or the tokenizer names. Raises BadRequest for an
    empty prompt or one longer than the context.
    """
    if chat and tokenizer.chat_template:
        ids = chat_ids(tokenizer, [{"role": "user", "content": prompt}])
    else:
        ids = tokenizer(prompt)["input_ids"]
    return generate_ids(model, tokenizer, ids, params or SamplingParams(), on_text=on_text)


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> list[int]:
    """Token ids of a conversation up to where the answer begins.

    Raises BadRequest where there is no chat template or it refuses these messages.
    """
    if not tokenizer.chat_template:
        raise BadRequest("this tokenizer has no chat template: use `quantmill generate --prompt TEXT`")
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        roles = ", ".join(m["role"] for m in messages)
        raise BadRequest(
            f"the chat template refuses the roles {roles} ({error}): leave out the system text"
        ) from error
    # The template writes its own special tokens: adding them again would double the first.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def generate_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    params: SamplingParams,
    *,
    on_text: OnText | None = None,
) -> Generation:
    """The same from token ids."""
    room = _room(model, ids)
    ends = end_tokens(model, tokenizer)
    stream = TokenStream(tokenizer, ends, on_text)
    prompt = torch.tensor([ids], device=model.device)
    config = _generation_config(model, tokenizer, params, min(params.max_new_tokens, room), ends)
    started = time.perf_counter()
    with torch.inference_mode(), _using(model, config), _seeded(params.seed, prompt.device):
        cast(Any, model).generate(prompt, attention_mask=torch.ones_like(prompt), streamer=stream)
    seconds = time.perf_counter() - started
    return Generation("".join(stream.pieces), len(ids), stream.tokens, seconds, stream.ended)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every token id that ends an answer: the generation config's, one or several, and the tokenizer's."""
    named = model.generation_config.eos_token_id
    ends = list(named) if isinstance(named, (list, tuple)) else [named]
    ends.append(tokenizer.eos_token_id)
    return tuple(sorted({int(e) for e in ends if e is not None}))


class Detokenizer:
    """Token ids one by one -> text that can be shown at once.

    Holds back tokens that end in part of a character. Decodes from a few tokens before the new ones on,
    because a tokenizer may treat the first token of a text differently (a leading space is dropped).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.start = 0  # where decoding begins
        self.shown = 0  # tokens before this one have been given out

    def push(self, token: int) -> str:
        """The text that this token completes, or ""."""
        self.ids.append(token)
        text = self._new_text()
        if text.endswith(_BROKEN) and len(self.ids) - self.shown < _LONGEST_PART:
            return ""
        if text:  # a token without text (a special one) is no start to decode from
            self.start = self.shown
        self.shown = len(self.ids)
        return text

    def flush(self) -> str:
        """What is still held back: bytes that never became a character."""
        text = self._new_text()
        self.start = self.shown = len(self.ids)
        return text

    def _new_text(self) -> str:
        before = self._decode(self.ids[self.start : self.shown])
        return self._decode(self.ids[self.start :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class TokenStream(BaseStreamer):
    """What Transformers' `generate` calls with each new token."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, ends: Collection[int], on_text: OnText | None
    ) -> None:
        self.detokenizer = Detokenizer(tokenizer)
        self.ends = frozenset(ends)
        self.on_text = on_text
        self.pieces: list[str] = []
        self.tokens = 0
        self.ended = False
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        """value: the prompt's ids at the first call, later one new id."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        for token in value.flatten().tolist():
            self.tokens += 1
            self.ended = token in self.ends
            if not self.ended:
                self._show(self.detokenizer.push(token))

    def end(self) -> None:
        self._show(self.detokenizer.flush())

    def _show(self, text: str) -> None:
        if text:
            self.pieces.append(text)
            if self.on_text is not None:
                self.on_text(text)


def _room(model: PreTrainedModel, ids: list[int]) -> int:
    """How many tokens the context has left."""
    if not ids:
        raise BadRequest("the prompt is empty: type some text after --prompt")
    context = getattr(model.config, "max_position_embeddings", None) or len(ids) + (1 << 20)
    if len(ids) >= context:
        raise BadRequest(
            f"the prompt has {len(ids)} tokens, the model's context is {context}: shorten the prompt"
        )
    return int(context) - len(ids)


def _generation_config(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    params: SamplingParams,
    new_tokens: int,
    ends: tuple[int, ...],
) -> GenerationConfig:
    """The model's own generation config with everything that `params` decides written over it."""
    config = copy.deepcopy(model.generation_config)
    sampled = params.temperature > 0
    values: dict[str, Any] = {
        "do_sample": sampled,
        "temperature": params.temperature if sampled else 1.0,  # 1, 1 and 50 are what `validate` calls unset
        "top_p": params.top_p if sampled else 1.0,
        "top_k": params.top_k if sampled else 50,
        "min_p": None,
        "typical_p": None,
        "repetition_penalty": params.repetition_penalty,
        "max_new_tokens": new_tokens,
        "max_length": None,
        "min_length": None,
        "num_beams": 1,
        "use_cache": True,
        "eos_token_id": list(ends) or None,
        "pad_token_id": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), 0),
    }
    for key, value in values.items():
        setattr(config, key, value)
    return config


@contextmanager
def _using(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """`config` as the model's own for a while: one that is passed gets its gaps filled from the model's."""
    before, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = before


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Random numbers from `seed` on, the caller's as they were afterwards. None: the caller's go on."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
