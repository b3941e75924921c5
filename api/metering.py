"""What one request takes from its caller's limits, and the headers that tell what is left.

Decides no limit and keeps no count: security/ and store/ do.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog
from flask import Flask, Response, g

from accounts.credentials import Principal
from api.context import services
from errors import StoreUnavailable
from model.types import Chunk, Done, Event, GenerateRequest
from quotas.allowances import Allowance
from quotas.limits import Bill, LimitExceeded, Room

log = structlog.get_logger("limits")


def register(app: Flask) -> None:
    """Say on every answer of `app` what is left of the limits it took from."""
    app.after_request(_show)


def allow(caller: Principal) -> None:
    """Remember what the caller of this request may have."""
    g.allowance = services().allowances.of(caller.role, caller.limits)


def allowance() -> Allowance:
    """What the caller of this request may have."""
    found: Allowance = g.allowance
    return found


def count_request(user: str) -> None:
    """Raises LimitExceeded."""
    _shown("requests", lambda: services().rate.hit(user, allowance().rpm))


class Meter:
    """The tokens of one generation: reserved before it starts, settled when it has ended."""

    def __init__(self, user: str) -> None:
        self._user, self._most = user, allowance().tokens_per_day
        self._bill: Bill | None = None
        self._used = self._prompt = 0

    def reserve(self, request: GenerateRequest) -> None:
        """Set aside what it may take at most. Raises LimitExceeded."""
        if self._most:
            self._prompt = len(request.prompt_ids)
            most = self._prompt + request.max_new_tokens
            _shown("tokens", lambda: self._take(services().tokens.reserve(self._user, most, self._most)))

    def begin(self) -> None:
        """The prompt is being read, and costs its tokens from here on."""
        self._used = self._prompt

    def observe(self, event: Event | None) -> None:
        """Count what the caller is given. The end has the exact figure; whoever leaves before it pays what came."""
        if isinstance(event, Done):
            self._used = event.usage.total_tokens
        elif isinstance(event, Chunk):
            self._used += 1

    def fail(self) -> None:
        """By no doing of the caller's: it costs nothing where nothing came of it."""
        if self._used == self._prompt:
            self._used = 0

    def settle(self) -> None:
        """Never raises: a bill that cannot be settled stays as high as it was reserved."""
        try:
            if self._bill:
                self._bill.settle(self._used)
        except StoreUnavailable as error:
            log.error("tokens not settled", user=self._user, reason=str(error))

    def _take(self, bill: Bill) -> Room:
        self._bill = bill
        return bill.room


def _shown(kind: str, take: Callable[[], Room]) -> None:
    rooms: dict[str, Room] = g.setdefault("rooms", {})
    try:
        rooms[kind] = take()
    except LimitExceeded as full:
        if full.room is not None:
            rooms[kind] = full.room
        raise


def _show(response: Response) -> Response:
    """In the names that OpenAI's clients know."""
    for kind, room in g.get("rooms", {}).items():
        response.headers[f"X-RateLimit-Limit-{kind.title()}"] = str(room.limit)
        response.headers[f"X-RateLimit-Remaining-{kind.title()}"] = str(room.left)
        response.headers[f"X-RateLimit-Reset-{kind.title()}"] = f"{max(room.reset, 0):.3f}s"
    return response
