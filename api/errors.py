"""The one place where a domain error becomes HTTP, in our shape or in OpenAI's."""

from __future__ import annotations

import math
import traceback
from typing import Any, NoReturn

import structlog
from flask import Flask, Response, jsonify, request
from flask.typing import ResponseReturnValue
from pydantic import BaseModel, ValidationError
from werkzeug.exceptions import HTTPException

from api.context import current
from errors import InvalidRequest, ServiceError
from quotas.limits import LimitExceeded

log = structlog.get_logger("api")

_TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error",
    503: "overloaded_error",
}  # fmt: skip
_MESSAGES = {404: "There is nothing at this address.", 405: "This method is not allowed here."}


class ErrorDetail(BaseModel):
    """What went wrong, for a reader and for a program. Under /v1 there is no `request_id`."""

    message: str
    type: str
    code: str | None
    param: str | None
    request_id: str | None = None


class ErrorBody(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetail


def register(app: Flask) -> None:
    """Answer every exception of `app` in the contract's shape."""
    app.register_error_handler(HTTPException, _http)
    app.register_error_handler(Exception, lambda error: respond(translate(error)))


def respond(error: ServiceError) -> Response:
    """The HTTP answer for a domain error."""
    current().error = error.code
    openai = request.path.startswith("/v1/")
    status = 400 if openai and error.status == 422 else error.status  # OpenAI's API knows no 422
    response = jsonify(payload(error, None if openai else current().id))
    response.status_code = status
    if isinstance(error, LimitExceeded) and error.remaining:
        current().remaining.append(error.remaining)
    if error.retry_after is not None:
        response.headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    if error.code == "insufficient_quota":
        response.headers["X-Should-Retry"] = "false"  # OpenAI's clients would try a 429 again within seconds
    return response


def payload(error: ServiceError, request_id: str | None) -> dict[str, Any]:
    """The error object, also for the middle of a stream; without a request id it is OpenAI's."""
    kind = _TYPES.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    detail = {"message": error.message, "type": kind, "code": error.code, "param": error.param}
    return {"error": detail if request_id is None else {**detail, "request_id": request_id}}


def invalid(error: ValidationError) -> NoReturn:
    """Raise InvalidRequest for pydantic's first finding: the field by name, never what was in it."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    path = ".".join(str(part) for part in first["loc"])[:80].encode("ascii", "backslashreplace").decode()
    words = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        words = f"The field {path!r} is not known or not supported here."
    raise InvalidRequest(words, param=path or None)


def translate(error: Exception) -> ServiceError:
    """Any failure as a ServiceError; a bug becomes a 500.

    A bug's message may hold what a user typed, so the log gets its type and place, and the client neither.
    """
    if isinstance(error, ServiceError):
        if error.detail is not None:
            log.error("refused", code=error.code, reason=error.detail)
        return error
    frames = traceback.extract_tb(error.__traceback__)[-6:]
    log.error("unexpected", error=type(error).__name__, where=[f"{f.filename}:{f.lineno} {f.name}" for f in frames])
    plain = ServiceError("Something went wrong here; the request id finds it in the log.", code="internal_error")
    plain.status = 500
    return plain


def _http(error: HTTPException) -> ResponseReturnValue:
    status = error.code or 500
    if status < 400:
        return error
    plain = ServiceError(_MESSAGES.get(status, error.name + "."), code=error.name.lower().replace(" ", "_"))
    plain.status = status
    response = respond(plain)
    response.headers.extend([pair for pair in error.get_headers() if pair[0] == "Allow"])
    return response
