"""The toy model with a tokenizer: a whole LLM in no time. Its answers are noise, but always the same noise."""

from __future__ import annotations

import functools
from typing import Any

from quantmill.runtime.engine_types import EngineConfig
from quantmill.runtime.llm import LLM
from quantmill.runtime.tokenizer import TextTokenizer
from tiny_models import byte_level_tokenizer
from toy_runtime import ToyRuntime


@functools.cache
def toy_tokenizer() -> TextTokenizer:
    return TextTokenizer.from_transformers(byte_level_tokenizer())


def toy_llm(engine: EngineConfig | None = None, **runtime: Any) -> LLM:
    tokenizer = toy_tokenizer()
    settings = {"vocab": tokenizer.vocab_size, "ends": tokenizer.eos_token_ids, **runtime}
    return LLM.over(ToyRuntime(**settings), tokenizer, engine)
