"""Errors in OpenAI's shape: what a client reads when a request is not served."""

from __future__ import annotations

import math
from dataclasses import dataclass

from starlette.responses import JSONResponse

from quantmill.errors import Busy, QuantmillError, SourceNotFound, UserError
from quantmill.types import Json


@dataclass
class Refusal(Exception):
    """An HTTP error on its way out. `param` names the field that is to blame."""

    status: int
    message: str
    kind: str = "invalid_request_error"
    code: str | None = None
    param: str | None = None
    retry_after: float | None = None

    def to_json(self) -> Json:
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(math.ceil(self.retry_after))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.to_json(), self.status, headers)


def invalid(message: str, param: str | None = None) -> Refusal:
    return Refusal(400, message, param=param)


def no_model(name: str, known: list[str]) -> Refusal:
    listed = ", ".join(known[:8])
    return Refusal(
        404,
        f"there is no model {name[:200]!r} here: use one of {listed}",
        code="model_not_found",
        param="model",
    )


def unavailable(name: str, error: QuantmillError, source: str, admin: bool) -> Refusal:
    """Of a model that could not be loaded. Only admins are told why: that names folders of this machine."""
    if admin or isinstance(error, Busy) or (isinstance(error, SourceNotFound) and source == name):
        return of(error)
    return Refusal(
        503,
        f"the model {name[:200]} cannot be loaded: whoever runs this server finds the reason in its log",
        "server_error",
        "model_unavailable",
    )


def of(error: QuantmillError) -> Refusal:
    """What a caller is told of our own errors."""
    if isinstance(error, Busy):
        return Refusal(
            429, str(error), "rate_limit_error", "rate_limit_exceeded", retry_after=error.retry_after
        )
    if isinstance(error, SourceNotFound):
        return Refusal(404, str(error), code="model_not_found", param="model")
    if isinstance(error, UserError):
        return Refusal(400, str(error))
    return Refusal(500, str(error), "server_error")
