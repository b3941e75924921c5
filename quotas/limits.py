"""What a user may ask for: requests a minute and open streams."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from secrets import token_hex

from redis import Redis

from errors import RateLimited

MAX_COUNT = 1 << 20  # of streams and of requests
MAX_TOKENS = (1 << 53) - 1  # the largest number that every JSON reader can hold
_MINUTE = 60.0
SOON = 1.0  # seconds; when a stream or a reservation ends cannot be known


@dataclass(frozen=True, slots=True)
class Limits:
    """streams: generations open at once; rpm: requests in any minute; tokens_per_day: 0 is no limit."""

    streams: int
    rpm: int
    tokens_per_day: int


class LimitTable:
    """The limits of each role. by_role: `ROLE.LIMIT=NUMBER`, as settings.py has checked; the last of several wins."""

    def __init__(self, default: Limits, by_role: Iterable[str] = ()) -> None:
        self._default = default
        self._roles: dict[str, Limits] = {}
        for rule in by_role:
            role, limit, number = re.split("[.=]", rule)
            self._roles[role] = self.of(role, **{limit: int(number)})

    def of(self, role: str, **own: int | None) -> Limits:
        """A user's own limits, and the role's where they are None."""
        return replace(self._roles.get(role, self._default), **{k: v for k, v in own.items() if v is not None})


@dataclass(frozen=True, slots=True)
class Remaining:
    """What is left of one limit. kind: Requests or Tokens. reset: seconds until there is more."""

    kind: str
    limit: int
    left: int
    reset: float


class LimitExceeded(RateLimited):
    """Trying again can succeed after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float, remaining: Remaining | None = None) -> None:
        super().__init__(message, retry_after=retry_after)
        self.remaining = remaining


class QuotaExceeded(LimitExceeded, code="insufficient_quota"):  # the code that OpenAI's clients know
    """Nothing is left until tomorrow."""


Hit = tuple[bool, int, float]  # whether it was counted, how many more fit, seconds until one more fits
Ask = Callable[[Callable[[], Hit]], Hit | None]  # RedisLink.ask: None while Redis does not answer

# A Hit, of which Redis keeps no fractions: microseconds. KEYS[1]: a user's requests of the last minute, by their time.
_HIT = """
local time = redis.call('TIME')
local now, limit, minute = time[1] * 1000000 + time[2], tonumber(ARGV[1]), 60000000
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - minute)
local count = redis.call('ZCARD', KEYS[1])
local counted = count < limit
if counted then
    redis.call('ZADD', KEYS[1], now, ARGV[2])
    redis.call('EXPIRE', KEYS[1], 60)
    count = count + 1
end
local place = math.max(count - limit, 0)
local blocking = redis.call('ZRANGE', KEYS[1], place, place, 'WITHSCORES')
return {counted and 1 or 0, limit - count, tonumber(blocking[2]) + minute - now}
"""


class RequestRate:
    """Requests a user in any minute, counted in Redis while it answers, else in this process.

    The `limits` package would do it too: its MemoryStorage starts a thread every 10 ms that walks all users (0.2 ms of
    CPU a request with one user and 1.4 ms with 2,000, where a deque takes 5 us), and in Redis it asks twice (1.2 ms).
    """

    def __init__(self, shared: tuple[Redis, Ask] | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """shared: the Redis in which several processes count together."""
        self._clock, self._lock = clock, threading.Lock()
        self._hits: defaultdict[str, deque[float]] = defaultdict(deque)
        self._ask: Ask = shared[1] if shared else lambda _: None
        if shared:
            self._hit = shared[0].register_script(_HIT)

    def hit(self, user_id: str, limit: int) -> Remaining:
        """Count one request. Raises LimitExceeded, and then does not count it."""
        shared = self._ask(lambda: self._hit_shared(user_id, limit))
        counted, left, reset = shared or self._hit_here(user_id, limit)
        left, reset = min(max(0, left), limit), min(_MINUTE, max(0.001, reset))  # Redis may send anything
        remaining = Remaining("Requests", limit, left, reset)
        if not counted:
            raise LimitExceeded(f"You may send {limit} requests a minute.", remaining.reset, remaining)
        return remaining

    def _hit_shared(self, user_id: str, limit: int) -> Hit:
        counted, left, reset = self._hit([f"rate:{user_id}"], [limit, token_hex(8)])
        return counted == 1, int(left), int(reset) / 1e6

    def _hit_here(self, user_id: str, limit: int) -> Hit:
        with self._lock:
            now, hits = self._clock(), self._hits[user_id]
            while hits and hits[0] <= now - _MINUTE:
                hits.popleft()
            if counted := len(hits) < limit:
                hits.append(now)
            blocking = hits[max(len(hits) - limit, 0)]  # one more fits once this is old, however low the limit is now
            return counted, limit - len(hits), blocking + _MINUTE - now


class ConcurrencyLimit:
    """Open streams by user, counted in the process that holds them."""

    def __init__(self) -> None:
        self._open: Counter[str] = Counter()
        self._lock = threading.Lock()

    @contextmanager
    def hold(self, user_id: str, limit: int) -> Iterator[None]:
        """Count one stream until this ends. Raises LimitExceeded."""
        with self._lock:
            if self._open[user_id] >= limit:
                raise LimitExceeded(f"You may have {limit} generations open at the same time.", SOON)
            self._open[user_id] += 1
        try:
            yield
        finally:
            with self._lock:
                self._open[user_id] -= 1
                self._open += Counter()  # drops the names that hold none
