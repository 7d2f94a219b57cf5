"""Constrained answers of a model that says noise: whatever it says keeps to the constraint."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from quantmill.errors import BadRequest
from quantmill.runtime.constraints import KEPT, Constraint, ConstraintCompiler, ConstraintKind
from quantmill.runtime.engine_types import Reason
from quantmill.runtime.llm import LLM
from quantmill.types import SamplingParams
from toy_llm import toy_llm, toy_tokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer"},
        "on": {"type": "boolean"},
    },
    "required": ["name", "age", "on"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with toy_llm() as made:
        yield made


def said(llm: LLM, kind: ConstraintKind, text: str, seed: int) -> str:
    params = SamplingParams(max_new_tokens=400, seed=seed, temperature=0.8, n=2)
    (answer,) = llm.generate("hello", params, constraint=Constraint(kind, text))
    assert all(c.ending.reason is Reason.STOP for c in answer.choices)
    return answer.choices[seed % 2].text


@pytest.mark.parametrize("seed", range(4))
def test_json_keeps_to_its_schema(llm: LLM, seed: int) -> None:
    document = json.loads(said(llm, ConstraintKind.JSON_SCHEMA, json.dumps(SCHEMA), seed))
    assert list(document) == ["name", "age", "on"]
    assert isinstance(document["name"], str)
    assert isinstance(document["age"], int)
    assert isinstance(document["on"], bool)


def test_any_json_object(llm: LLM) -> None:
    assert isinstance(json.loads(said(llm, ConstraintKind.JSON_OBJECT, "", 0)), dict)


@pytest.mark.parametrize("seed", range(3))
def test_regular_expressions(llm: LLM, seed: int) -> None:
    assert re.fullmatch(r"[a-c]{3}-\d{1,4}", said(llm, ConstraintKind.REGEX, r"[a-c]{3}-[0-9]{1,4}", seed))


def test_grammars(llm: LLM) -> None:
    assert re.fullmatch(r"(ab)*c", said(llm, ConstraintKind.GRAMMAR, 'start: "ab" start | "c"', 1))


def test_choices(llm: LLM) -> None:
    strings = ["yes", 'no "never"', "ja\n"]
    hot = SamplingParams(temperature=50.0, top_k=0, top_p=1.0, repetition_penalty=1.0, n=20, seed=1)
    constraint = Constraint(ConstraintKind.CHOICE, json.dumps(strings))
    (answer,) = llm.generate("hello", hot, constraint=constraint)
    assert {c.text for c in answer.choices} == set(strings)


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (ConstraintKind.REGEX, "(", "the regex cannot be used"),
        (ConstraintKind.JSON_SCHEMA, "[1]", "is list; an object is needed"),
        (ConstraintKind.JSON_SCHEMA, "{", "is no JSON"),
        (ConstraintKind.JSON_SCHEMA, "[" * 100_000, "is no JSON"),
        (ConstraintKind.JSON_SCHEMA, '{"type": "nope"}', "cannot be used"),
        (ConstraintKind.GRAMMAR, "start: nowhere", "cannot be used"),
        (ConstraintKind.CHOICE, "[]", "must be a list of strings"),
        (ConstraintKind.CHOICE, "[1]", "must be a list of strings"),
        (ConstraintKind.CHOICE, "yes", "no JSON list"),
        (ConstraintKind.REGEX, "a" * 200_000, "131072 are the most"),
    ],
)
def test_constraints_that_make_no_sense_are_refused(
    llm: LLM, kind: ConstraintKind, text: str, message: str
) -> None:
    with pytest.raises(BadRequest, match=message):
        llm.constraints.compile(Constraint(kind, text))


def test_a_model_without_an_end_token_cannot_be_constrained() -> None:
    compiler = ConstraintCompiler(toy_tokenizer(), 318, ())
    with pytest.raises(BadRequest, match="names no end token"):
        compiler.compile(Constraint(ConstraintKind.JSON_OBJECT))


def test_a_vocabulary_larger_than_the_tokenizers() -> None:
    with toy_llm(vocab=400) as llm:
        params = SamplingParams(temperature=2.0, top_k=0, top_p=1.0, max_new_tokens=50, seed=3)
        (answer,) = llm.generate("x", params, constraint=Constraint(ConstraintKind.REGEX, "[a-z]{5}"))
        assert re.fullmatch("[a-z]{5}", answer.text)


def test_only_so_many_are_remembered() -> None:
    compiler = ConstraintCompiler(toy_tokenizer(), 318, (1,))
    for i in range(KEPT + 3):
        compiler.compile(Constraint(ConstraintKind.REGEX, f"a{{{i + 1}}}"))
    assert len(compiler._compiled) == KEPT
