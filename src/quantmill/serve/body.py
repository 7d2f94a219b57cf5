"""The body of a request: read up to a limit, decoded, and checked before anything looks at it.

Strange JSON (too deep, not UTF-8, NaN, half surrogates, numbers of a thousand digits) ends here with a 400.
"""

from __future__ import annotations

import json
from difflib import get_close_matches
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from quantmill.serve.refusal import Refusal, invalid

PASSED_OVER = 32 << 20  # bytes too many that are read all the same: who is still sending hears no refusal
DEEPEST = 64  # levels of arrays and objects
Model = TypeVar("Model", bound=BaseModel)


async def read_model(request: Request, kind: type[Model], limit: int) -> Model:
    """The body as `kind`. Raises Refusal: 400, 413 or 415."""
    return validate(parse(await _read(request, limit)), kind)


def parse(body: bytes) -> Any:
    """JSON without anything that could trip up what comes after. Raises Refusal."""
    try:
        data = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise invalid(f"the body is not UTF-8: byte {error.start} is wrong") from None
    except RecursionError:
        raise invalid(f"the body is nested too deeply: {DEEPEST} levels are the most") from None
    except ValueError as error:
        raise invalid(f"the body is not JSON: {str(error)[:200]}") from None
    _examine(data)
    return data


def validate(data: Any, kind: type[Model]) -> Model:
    """Raises Refusal with the first thing that is wrong and where."""
    if not isinstance(data, dict):
        raise invalid(f"the body is a JSON {type(data).__name__}; an object is needed")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])[:200]
        raise invalid(_said(where, first["type"], first["msg"], kind)[:400], where or None) from None


def _said(where: str, kind_of_error: str, message: str, kind: type[BaseModel]) -> str:
    if not where:
        return message
    if kind_of_error == "missing":
        return f"{where} is missing: it has to be given"
    if kind_of_error == "extra_forbidden":
        near = get_close_matches(where, kind.model_fields, n=1)
        return f"{where} is no field here: " + (f"do you mean {near[0]}?" if near else "leave it out")
    return f"{where}: {message}"


async def _read(request: Request, limit: int) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # what a form on a strange web page cannot send
        raise Refusal(
            415, f"the content type is {kind[:80] or 'missing'}: send Content-Type: application/json"
        )
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > limit + PASSED_OVER:
        raise _too_large(limit)
    body, size = bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= limit:
            body += chunk
        elif size > limit + PASSED_OVER:
            break
    if size > limit:
        raise _too_large(limit)
    return bytes(body)


def _too_large(limit: int) -> Refusal:
    return Refusal(413, f"the body is larger than {limit} bytes", code="request_too_large")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _examine(data: Any) -> None:
    """Level by level, so that depth costs no stack."""
    level = [data]
    for _ in range(DEEPEST):
        if not level:
            return
        below: list[Any] = []
        for item in level:
            if isinstance(item, str):
                _examine_text(item)
            elif isinstance(item, dict):
                below += item.keys()
                below += item.values()
            elif isinstance(item, list):
                below += item
        level = below
    raise invalid(f"the body is nested too deeply: {DEEPEST} levels are the most")


def _examine_text(text: str) -> None:
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise invalid("a string holds half of a surrogate pair, which is no character") from None
