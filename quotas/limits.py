"""What a user may ask for: requests a minute and open streams."""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from limits import RateLimitItemPerSecond
from limits.storage import RedisStorage
from limits.strategies import MovingWindowRateLimiter
from redis import ConnectionPool

from errors import RateLimited

MAX_COUNT = 1 << 20  # of streams and of requests
MAX_TOKENS = (1 << 53) - 1  # the largest number that every JSON reader can hold
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
            (role, limit), number = rule.partition("=")[0].split("."), int(rule.partition("=")[2])
            self._roles[role] = replace(self._roles.get(role, default), **{limit: number})

    def of(self, role: str, streams: int | None, rpm: int | None, tokens_per_day: int | None) -> Limits:
        """A user's own limits; the role's where they are None."""
        base = self._roles.get(role, self._default)
        return Limits(
            base.streams if streams is None else streams,
            base.rpm if rpm is None else rpm,
            base.tokens_per_day if tokens_per_day is None else tokens_per_day,
        )


@dataclass(frozen=True, slots=True)
class Remaining:
    """What is left of one limit. `reset`: seconds until there is more."""

    limit: int
    left: int
    reset: float


class LimitExceeded(RateLimited):
    """Trying again can succeed after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float, remaining: Remaining | None = None) -> None:
        super().__init__(message, retry_after=retry_after)
        self.remaining = remaining


class QuotaExceeded(LimitExceeded):
    """Nothing is left until tomorrow."""

    code = "insufficient_quota"  # the code that OpenAI's clients know


Hit = tuple[bool, int, float]  # whether it was counted, how many more fit, seconds until one more fits
Ask = Callable[[Callable[[], Hit | None]], Hit | None]  # RedisLink.ask: None while Redis does not answer


class RateLimit:
    """Hits by name in a moving window, counted in Redis while it answers, else in this process.

    In memory it keeps a deque a name instead of the library's MemoryStorage, which starts a thread every 10 ms that
    walks all names: 0.2 ms of CPU a request with one user and 1.4 ms with 2,000, where this takes 2 us.
    """

    def __init__(
        self,
        shared: tuple[ConnectionPool, Ask] | None = None,
        clock: Callable[[], float] = time.monotonic,
        max_names: int = 20_000,
    ) -> None:
        """shared: the Redis in which several processes count together."""
        self._clock, self._max_names = clock, max_names
        self._hits: OrderedDict[str, deque[float]] = OrderedDict()
        self._lock = threading.Lock()
        self._shared: tuple[MovingWindowRateLimiter, Ask] | None = None
        if shared:
            storage = RedisStorage("redis://", connection_pool=shared[0], key_prefix="flask-llm")
            self._shared = MovingWindowRateLimiter(storage), shared[1]

    def hit(self, name: str, limit: int, seconds: int = 60) -> Remaining:
        """Count one hit. Raises LimitExceeded, and then does not count it, when the last `seconds` had `limit`."""
        counted, left, reset = self._hit_shared(name, limit, seconds) or self._hit_here(name, limit, seconds)
        remaining = Remaining(limit, max(left, 0), max(reset, 0.001))
        if not counted:
            raise LimitExceeded(f"Too often: at most {limit} times in {seconds} seconds.", remaining.reset, remaining)
        return remaining

    def forget(self, name: str, limit: int, seconds: int = 60) -> None:
        if self._shared:
            limiter, ask = self._shared
            ask(lambda: limiter.clear(RateLimitItemPerSecond(limit, seconds), name))
        with self._lock:
            self._hits.pop(name, None)

    def _hit_shared(self, name: str, limit: int, seconds: int) -> Hit | None:
        if self._shared is None:
            return None
        (limiter, ask), item = self._shared, RateLimitItemPerSecond(limit, seconds)

        def count() -> Hit:
            counted, stats = limiter.hit(item, name), limiter.get_window_stats(item, name)
            return counted, stats.remaining, stats.reset_time - time.time()

        return ask(count)

    def _hit_here(self, name: str, limit: int, seconds: int) -> Hit:
        with self._lock:
            now, hits = self._clock(), self._hits.setdefault(name, deque())
            self._hits.move_to_end(name)
            while hits and hits[0] <= now - seconds:
                hits.popleft()
            if counted := len(hits) < limit:
                hits.append(now)
            if len(self._hits) > self._max_names:  # invented login names must not fill the memory
                self._hits.popitem(last=False)
            blocking = hits[max(len(hits) - limit, 0)]  # there is room once this one is old, however low the limit is
            return counted, limit - len(hits), blocking + seconds - now


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
