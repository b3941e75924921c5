"""One request, one id and one line in the log.

Never sees a body: no prompt, token or password can reach the log from here.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import structlog
from flask import Flask, Response, g, request

from model.types import Done
from telemetry import request_id

log = structlog.get_logger("request")


@dataclass(slots=True)
class Trace:
    """What the summary line says beside method, path and status; filled in as the request goes."""

    id: str
    method: str
    route: str | None
    path: str
    started: float = field(default_factory=time.monotonic)
    user: str | None = None
    cache: str | None = None
    done: Done | None = None
    error: str | None = None

    def write(self, status: int) -> None:
        usage = self.done.usage if self.done else None
        log.info(
            "request",
            request_id=self.id,
            method=self.method,
            route=self.route,
            path=self.path,
            status=status,
            duration_ms=round((time.monotonic() - self.started) * 1000, 1),
            user=self.user,
            cache=self.cache,
            prompt_tokens=usage.prompt_tokens if usage else None,
            completion_tokens=usage.completion_tokens if usage else None,
            finish_reason=self.done.finish_reason.value if self.done else None,
            error=self.error,
        )


def register(app: Flask) -> None:
    """Give every request of `app` an id from its first moment and a line at its last."""
    app.before_request(_begin)
    app.after_request(_end)


def current() -> Trace:
    """The trace of the request being answered."""
    trace: Trace = g.trace
    return trace


def _begin() -> None:
    id = request_id(request.headers.get("X-Request-Id"))
    route = request.url_rule.rule if request.url_rule else None
    g.trace = Trace(id, request.method[:16], route, request.path[:256])
    structlog.contextvars.clear_contextvars()  # the thread served another request before
    structlog.contextvars.bind_contextvars(request_id=id)


def _end(response: Response) -> Response:
    trace = current()
    response.headers["X-Request-Id"] = trace.id
    response.call_on_close(lambda: trace.write(response.status_code))
    return response
