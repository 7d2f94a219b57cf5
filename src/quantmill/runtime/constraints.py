"""Output that keeps to a JSON schema, a regular expression or a grammar: which tokens may come next.

The work is llguidance's; this module names what can be asked for and turns the library's answers into masks and
errors. Every mask permits an end token where the text may end.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from threading import Lock
from typing import Any

import numpy as np

from quantmill.errors import BadRequest, QuantmillError
from quantmill.runtime.sampling import Mask
from quantmill.runtime.tokenizer import TextTokenizer

LONGEST = 1 << 17  # characters of a constraint
KEPT = 64  # compiled constraints that are remembered
SPACES = r"[ \n\t]{0,16}"  # between the parts of a JSON document: a small model may get lost in blanks


class ConstraintKind(StrEnum):
    JSON_OBJECT = "json_object"  # any JSON object; no text
    JSON_SCHEMA = "json_schema"  # a JSON schema as text
    REGEX = "regex"  # in the syntax of Rust's regex, whole answer
    GRAMMAR = "grammar"  # context-free, in Lark's syntax as llguidance reads it
    CHOICE = "choice"  # one of the strings of a JSON list


@dataclass(frozen=True, slots=True)
class Constraint:
    """What an answer must look like."""

    kind: ConstraintKind
    text: str = ""


class ConstraintCompiler:
    """Constraints for one tokenizer. Safe for several threads."""

    def __init__(self, tokenizer: TextTokenizer, vocab_size: int, ends: tuple[int, ...]) -> None:
        """vocab_size: the model's, which may be larger than the tokenizer's; ends: tokens that end an answer."""
        self.tokenizer, self.vocab_size, self.ends = tokenizer, vocab_size, ends
        self._lock = Lock()
        self._words: Any = None
        self._compiled: OrderedDict[Constraint, Any] = OrderedDict()

    def compile(self, constraint: Constraint) -> Callable[[], GrammarMatcher]:
        """A maker of matchers, one for each answer. Raises BadRequest for a constraint that makes no sense."""
        prototype = self._prototype(constraint)
        return lambda: GrammarMatcher(prototype.deep_copy(), self.vocab_size)

    def _prototype(self, constraint: Constraint) -> Any:
        with self._lock:
            if constraint in self._compiled:
                self._compiled.move_to_end(constraint)
                return self._compiled[constraint]
            matcher = self._matcher(constraint)
            self._compiled[constraint] = matcher
            if len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
            return matcher

    def _matcher(self, constraint: Constraint) -> Any:
        from llguidance import LLMatcher, LLTokenizer

        if len(constraint.text) > LONGEST:
            raise BadRequest(
                f"the {constraint.kind} has {len(constraint.text)} characters; {LONGEST} are the most"
            )
        if not self.ends:
            raise BadRequest("this model names no end token, so a constrained answer could not end")
        grammar = GRAMMARS[constraint.kind](constraint.text)
        if self._words is None:
            text = self.tokenizer.backend.to_str()
            self._words = LLTokenizer(text, n_vocab=self.vocab_size, eos_token=list(self.ends))
        matcher = LLMatcher(self._words, grammar, log_level=0)
        if matcher.is_error():
            reason = " ".join(matcher.get_error().split())[:300]
            raise BadRequest(f"the {constraint.kind} cannot be used: {reason}")
        return matcher


class GrammarMatcher:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def mask(self) -> Mask:
        """(vocab,) True where a token may come next. Raises QuantmillError where the library gives up."""
        allowed = np.frombuffer(self._matcher.compute_logit_bias(), np.uint8)[: self._vocab_size] != 0
        if self._matcher.is_error() or not allowed.any():
            raise QuantmillError(
                f"the constraint cannot go on: {self._matcher.get_error() or 'no token fits'}"
            )
        return np.asarray(allowed)

    def accept(self, token: int) -> bool:
        """Go on by one token -> True where nothing may follow it."""
        self._matcher.consume_token(token)
        return bool(self._matcher.is_stopped())


def _json_grammar(schema: Any) -> str:
    from llguidance import LLMatcher

    try:
        return str(LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": SPACES}))
    except ValueError as error:
        raise BadRequest(f"the JSON schema cannot be read: {error}") from error


def _schema(text: str) -> str:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the JSON schema is no JSON: {error}") from error
    if not isinstance(schema, dict):
        raise BadRequest(f"the JSON schema is {type(schema).__name__}; an object is needed")
    return _json_grammar(text)


def _regex(text: str) -> str:
    from llguidance import LLMatcher

    return str(LLMatcher.grammar_from_regex(text))


def _lark(text: str) -> str:
    from llguidance import LLMatcher

    return str(LLMatcher.grammar_from_lark(text))


def _choice(text: str) -> str:
    """One of several strings, as a Lark grammar: its strings are JSON's."""
    try:
        strings = json.loads(text)
    except ValueError as error:
        raise BadRequest(f"the choices are no JSON list: {error}") from error
    if not isinstance(strings, list) or not strings or not all(isinstance(s, str) and s for s in strings):
        raise BadRequest("the choices must be a list of strings, none of them empty")
    return _lark("start: " + " | ".join(json.dumps(s) for s in strings))


GRAMMARS: dict[ConstraintKind, Callable[[str], str]] = {
    ConstraintKind.JSON_OBJECT: lambda _: _json_grammar('{"type": "object"}'),
    ConstraintKind.JSON_SCHEMA: _schema,
    ConstraintKind.REGEX: _regex,
    ConstraintKind.GRAMMAR: _lark,
    ConstraintKind.CHOICE: _choice,
}
