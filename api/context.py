"""What a route works with: the services that app.py built, and the log line of the request being answered."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog
from flask import Flask, Response, current_app, g, request

from accounts.passwords import Passwords
from accounts.state import State
from accounts.tokens import TokenPolicy
from accounts.users import Users
from api.answers import Answers
from api.places import Places
from api.running import Running
from audit.log import AuditLog
from crypto import Box
from model.types import Backend, Done
from quotas.allowances import Allowances
from quotas.limits import LoginGuard, RequestRate, StreamLimit, TokenQuota
from settings import Settings
from telemetry import request_id

NAME = "flask-llm"


@dataclass(frozen=True, slots=True)
class Services:
    """One of each. `model` is its public name; `jwt_key` signs tokens; `box` seals what tickets hold, and
    `contents` what the audit log keeps of prompts and answers.

    `calls` and `guesses` are the places for generations, running or waiting, and for passwords being checked.
    """

    settings: Settings
    model: str
    backend: Backend
    answers: Answers
    running: Running
    users: Users
    state: State
    audit: AuditLog
    contents: Box
    passwords: Passwords
    policy: TokenPolicy
    jwt_key: bytes
    box: Box
    allowances: Allowances
    rate: RequestRate
    streams: StreamLimit
    tokens: TokenQuota
    logins: LoginGuard
    calls: Places
    guesses: Places
    sanitise: Callable[[str], str]


def services() -> Services:
    """The services of the app that answers this request."""
    found: Services = current_app.extensions[NAME]
    return found


_log = structlog.get_logger("request")


@dataclass(slots=True)
class RequestLog:
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
        _log.info(
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


def current() -> RequestLog:
    """The log line of the request being answered."""
    found: RequestLog = g.request_log
    return found


def _begin() -> None:
    id = request_id(request.headers.get("X-Request-Id"))
    route = request.url_rule.rule if request.url_rule else None
    g.request_log = RequestLog(id, request.method[:16], route, request.path[:256])
    structlog.contextvars.clear_contextvars()  # the thread served another request before
    structlog.contextvars.bind_contextvars(request_id=id)


def _end(response: Response) -> Response:
    found = current()
    response.headers["X-Request-Id"] = found.id
    response.call_on_close(lambda: found.write(response.status_code))
    return response
