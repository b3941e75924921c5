"""What a route works with: the services that app.py built, and the log line of the request being answered."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog
from flask import Flask, Response, current_app, g, request

from accounts.credentials import Credentials
from accounts.guard import LoginGuard
from accounts.passwords import Passwords
from accounts.tickets import Tickets
from accounts.tokens import TokenPolicy
from accounts.users import Users
from audit.log import AuditLog
from cache.responses import ResponseCache
from crypto import Encryptor
from db import Database
from errors import Overloaded
from model.types import Backend, Done
from quotas.limits import ConcurrencyLimit, LimitTable, Remaining, RequestRate
from quotas.usage import UsageStore
from settings import Settings
from telemetry import request_id

if TYPE_CHECKING:
    from api.generation import Generation

NAME = "flask-llm"
LOGINS = 16  # requests that check a password, running or waiting: two compute a hash at a time
PREPARING = 2  # long prompts being cleaned and tokenised, so that the model thread gets the interpreter's lock


def max_generations(settings: Settings) -> int:
    """Generations that may hold a thread: more than the engine admits, which knows better when to come back."""
    return settings.slots + settings.max_queue + 16


class Capacity:
    """At most `limit` holders at a time; others are refused and told to come back in `retry_after` seconds."""

    def __init__(self, limit: int, retry_after: float) -> None:
        self._free = threading.BoundedSemaphore(limit)
        self._retry_after = retry_after

    @contextmanager
    def take(self, wait: float = 0.0) -> Iterator[None]:
        """Hold one place inside, after at most `wait` seconds. Raises Overloaded."""
        if not self._free.acquire(timeout=wait):
            raise Overloaded("Too many requests are waiting here already.", retry_after=self._retry_after)
        try:
            yield
        finally:
            self._free.release()


@dataclass(frozen=True, slots=True)
class Services:
    """One of each. `model` is its public name; `contents` encrypts what the audit log keeps of prompts and answers.

    running: the generations under way, by GenerateRequest.id. generations and preparing bound the threads that each may
    hold. sanitise: a text cleaned, and how many elements were removed.
    """

    settings: Settings
    model: str
    backend: Backend
    cache: ResponseCache
    database: Database
    users: Users
    credentials: Credentials
    audit: AuditLog
    contents: Encryptor
    passwords: Passwords
    policy: TokenPolicy
    guard: LoginGuard
    tickets: Tickets
    limits: LimitTable
    rate: RequestRate
    streams: ConcurrencyLimit
    usage: UsageStore
    generations: Capacity
    sanitise: Callable[[str], tuple[str, int]]
    preparing: Capacity = field(default_factory=lambda: Capacity(PREPARING, retry_after=5))
    running: dict[str, Generation] = field(default_factory=dict)


def services() -> Services:
    """The services of the app that answers this request."""
    found: Services = current_app.extensions[NAME]
    return found


_log = structlog.get_logger("request")


@dataclass(slots=True)
class RequestLog:
    """The request being answered: what its summary line says, and what is left of the limits that it took from."""

    id: str
    method: str
    route: str | None
    path: str
    started: float = field(default_factory=time.monotonic)
    user: str | None = None
    user_id: str | None = None
    key: str | None = None  # the id of the API key that was used
    cache: str | None = None
    done: Done | None = None
    error: str | None = None
    remaining: list[Remaining] = field(default_factory=list)

    def write(self, status: int) -> None:
        done, duration = self.done, round((time.monotonic() - self.started) * 1000, 1)
        _log.info(
            "request", request_id=self.id, method=self.method, route=self.route, path=self.path, status=status,
            duration_ms=duration, user=self.user, user_id=self.user_id, key=self.key, cache=self.cache,
            prompt_tokens=done and done.usage.prompt_tokens, completion_tokens=done and done.usage.completion_tokens,
            finish_reason=done and done.finish_reason.value, error=self.error,
        )  # fmt: skip


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
    structlog.contextvars.bind_contextvars(request_id=id)


def _end(response: Response) -> Response:
    found = current()
    response.headers["X-Request-Id"] = found.id
    for each in found.remaining:  # in the names that OpenAI's clients know
        response.headers[f"X-RateLimit-Limit-{each.kind}"] = str(each.limit)
        response.headers[f"X-RateLimit-Remaining-{each.kind}"] = str(each.left)
        response.headers[f"X-RateLimit-Reset-{each.kind}"] = f"{each.reset:.3f}s"
    response.call_on_close(lambda: found.write(response.status_code))
    return response
