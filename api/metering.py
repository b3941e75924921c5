"""What one request takes from its caller's limits, and the headers that tell what is left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

from flask import Flask, Response, g

from accounts.credentials import Principal
from api.context import services
from model.types import Chunk, Done, Event, GenerateRequest
from quotas.limits import LimitExceeded, Limits, Remaining
from quotas.usage import Counts, Reservation


def register(app: Flask) -> None:
    """Say on every answer of `app` what is left of the limits it took from, in the names that OpenAI's clients know."""
    app.after_request(_add_headers)


def allow(caller: Principal) -> None:
    """Remember what the caller of this request may have."""
    g.limits = services().limits.of(caller.role, **asdict(caller.limits))


def limits() -> Limits:
    """What the caller of this request may have."""
    found: Limits = g.limits
    return found


def count_request(user_id: str) -> None:
    """Raises LimitExceeded."""
    _shown("Requests", lambda: services().rate.hit(user_id, limits().rpm))


class Meter:
    """One generation's usage: tokens are reserved before it starts and recorded when it has ended."""

    def __init__(self, user_id: str, model: str) -> None:
        self._user_id, self._model, self._quota = user_id, model, limits().tokens_per_day
        self._usage = services().usage  # a stream ends when the app's context is gone
        self._reservation: Reservation | None = None
        self._prompt = self._cached = self._generated = self._requests = self._errors = 0

    def reserve(self, request: GenerateRequest) -> None:
        """Set aside what it may take at most. Not for a cached answer, which costs no tokens. Raises LimitExceeded."""
        self._prompt = len(request.prompt_ids)
        if self._quota:
            _shown("Tokens", lambda: self._reserve(self._prompt + request.max_new_tokens))

    def begin(self) -> None:
        """It counts as a request from here on."""
        self._requests = 1

    def observe(self, event: Event | None) -> None:
        """Count what the caller is given. Done has the exact figures; a client that leaves before it pays what came."""
        if self._prompt and isinstance(event, Chunk):
            self._generated += 1
        elif self._prompt and isinstance(event, Done):
            self._prompt, self._cached = event.usage.prompt_tokens, event.usage.cached_tokens
            self._generated = event.usage.completion_tokens

    def fail(self) -> None:
        """The service failed: the prompt costs nothing where no text came of it."""
        self._errors = 1
        self._prompt *= self._generated > 0

    def settle(self) -> None:
        """Record it. What was refused before it began costs nothing."""
        counts = Counts(1, self._prompt, self._cached, self._generated, self._errors) if self._requests else Counts()
        if self._requests or self._reservation:
            self._usage.record(self._user_id, self._model, counts, self._reservation)

    def _reserve(self, tokens: int) -> Remaining:
        self._reservation = self._usage.reserve(self._user_id, tokens, self._quota)
        return self._reservation.remaining


def _shown(kind: str, take: Callable[[], Remaining]) -> None:
    shown: dict[str, Remaining] = g.setdefault("remaining", {})
    try:
        shown[kind] = take()
    except LimitExceeded as error:
        if error.remaining:
            shown[kind] = error.remaining
        raise


def _add_headers(response: Response) -> Response:
    for kind, remaining in g.get("remaining", {}).items():
        response.headers[f"X-RateLimit-Limit-{kind}"] = str(remaining.limit)
        response.headers[f"X-RateLimit-Remaining-{kind}"] = str(remaining.left)
        response.headers[f"X-RateLimit-Reset-{kind}"] = f"{remaining.reset:.3f}s"
    return response
