"""From a request's fields to sampling parameters and constraints.

What a client leaves out has OpenAI's defaults here (temperature 1, no filters), not those of the command line.
"""

from __future__ import annotations

import json
from typing import Any

from quantmill.runtime.constraints import Constraint, ConstraintKind
from quantmill.serve.refusal import invalid
from quantmill.serve.schemas import ChatRequest, CompletionRequest, Sampling, SchemaFormat
from quantmill.types import SamplingParams

NAMED_PARTS = {"properties", "$defs", "definitions"}  # of a schema: schemas by name
PARTS = {"items", "prefixItems", "anyOf", "oneOf"}
COMBINING = {"allOf", "anyOf", "oneOf", "if", "$ref", "dependentSchemas"}
OPENERS = {"additionalProperties", "unevaluatedProperties", "patternProperties"}
UNLIMITED = 1 << 30  # tokens; the engine stops at the context


def chat_params(request: ChatRequest) -> SamplingParams:
    """Raises Refusal."""
    if request.top_logprobs is not None and not request.logprobs:
        raise invalid("top_logprobs asks for alternatives: set logprobs to true", "top_logprobs")
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    limit = request.max_completion_tokens or request.max_tokens or UNLIMITED
    return _params(request, limit, logprobs, None)


def completion_params(request: CompletionRequest) -> SamplingParams:
    """Raises Refusal."""
    best_of = request.best_of
    if best_of is not None and best_of < (request.n or 1):
        raise invalid(f"best_of is {best_of} and n is {request.n}; best_of is the larger one", "best_of")
    if best_of is not None and best_of > (request.n or 1) and request.stream:
        raise invalid("best_of cannot be streamed: the best is known at the end", "best_of")
    limit = 16 if request.max_tokens is None else max(1, request.max_tokens)
    return _params(request, limit, request.logprobs, best_of)


def _params(request: Sampling, limit: int, logprobs: int | None, best_of: int | None) -> SamplingParams:
    stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    top_p, typical = request.top_p, request.typical_p
    for name, value in (("top_p", top_p), ("typical_p", typical)):
        if value == 0:
            raise invalid(f"{name} is 0: no token could be drawn; temperature 0 is greedy", name)
    return SamplingParams(
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if top_p is None else top_p,
        top_k=max(0, request.top_k or 0),
        repetition_penalty=request.repetition_penalty or 1.0,
        max_new_tokens=limit,
        seed=request.seed,
        min_p=request.min_p or 0.0,
        typical_p=1.0 if typical is None else typical,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=_bias(request.logit_bias or {}),
        stop=stop,
        stop_token_ids=tuple(request.stop_token_ids or ()),
        ignore_eos=bool(request.ignore_eos),
        logprobs=logprobs,
        n=request.n or 1,
        best_of=best_of,
    )


def _bias(given: dict[str, float]) -> dict[int, float]:
    wrong = next((k for k in given if not (k.isascii() and k.isdecimal() and len(k) < 10)), None)
    if wrong is not None:
        raise invalid(f"logit_bias has the key {wrong[:40]!r}; token ids are needed", "logit_bias")
    return {int(token): float(value) for token, value in given.items()}


def constraint_of(request: Sampling) -> Constraint | None:
    """What the answer must look like. Raises Refusal where it is asked for twice."""
    asked: list[Constraint] = []
    if request.guided_json is not None:
        asked.append(schema_constraint(request.guided_json))
    if request.guided_regex is not None:
        asked.append(Constraint(ConstraintKind.REGEX, request.guided_regex))
    if request.guided_grammar is not None:
        asked.append(Constraint(ConstraintKind.GRAMMAR, request.guided_grammar))
    if request.guided_choice is not None:
        asked.append(Constraint(ConstraintKind.CHOICE, json.dumps(request.guided_choice)))
    if isinstance(request, ChatRequest) and request.response_format is not None:
        asked += _format(request.response_format)
    if len(asked) > 1:
        raise invalid("the answer's form is given twice: leave one of response_format and guided_* out")
    return asked[0] if asked else None


def _format(form: Any) -> list[Constraint]:
    if isinstance(form, SchemaFormat):
        schema = form.json_schema.schema_
        if schema is None:
            raise invalid("response_format.json_schema has no schema", "response_format")
        if form.json_schema.strict is False:
            return [Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(schema))]
        return [schema_constraint(schema)]
    return [Constraint(ConstraintKind.JSON_OBJECT)] if form.type == "json_object" else []


def schema_constraint(schema: dict[str, Any]) -> Constraint:
    return Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(closed(schema)))


def closed(schema: Any) -> Any:
    """The schema with objects that may hold only what they list, unless they say otherwise: a model that may invent
    fields does, and never ends. Schemas that only mean something together stay as they are."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    together = "allOf" in schema or ("properties" in schema and bool(COMBINING & schema.keys()))
    made = dict(schema)
    for key in NAMED_PARTS & schema.keys():
        if isinstance(schema[key], dict):
            made[key] = {name: closed(part) for name, part in schema[key].items()}
    for key in PARTS & schema.keys() if not together else ():
        made[key] = closed(schema[key])
    listed = isinstance(schema.get("properties"), dict) and not together and not OPENERS & schema.keys()
    return made | {"additionalProperties": False} if listed else made
