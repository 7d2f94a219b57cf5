"""The toy model as a process of its own opens it. Imports little: each such test starts an interpreter."""

from __future__ import annotations

import os
from pathlib import Path

from tokenizers import Tokenizer

from quantmill.errors import UnsupportedModel
from quantmill.runtime.interface import Runtime
from quantmill.runtime.tokenizer import TextTokenizer
from toy_runtime import ToyRuntime


def open_toy(words: Path, special: dict[str, str], **runtime: object) -> tuple[Runtime, TextTokenizer]:
    """words: a tokenizer.json; special: its named tokens."""
    tokenizer = TextTokenizer(Tokenizer.from_file(str(words)), special, {})
    given = {"vocab": tokenizer.vocab_size, "ends": tokenizer.eos_token_ids, **runtime}
    return ToyRuntime(**given), tokenizer  # type: ignore[arg-type]


def open_nothing() -> tuple[Runtime, TextTokenizer]:
    raise UnsupportedModel("no such model")


def open_badly() -> tuple[Runtime, TextTokenizer]:
    os._exit(7)
