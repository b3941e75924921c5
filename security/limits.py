"""How often one may ask: requests a minute, streams at once, guesses at a password.

Does not outlive the process, and knows no HTTP status; the caller turns `retry_after` into a header.
"""

from __future__ import annotations

import hashlib
import ipaddress
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable

from limits import RateLimitItem, RateLimitItemPerMinute, RateLimitItemPerSecond
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

Clock = Callable[[], float]


class LimitExceeded(Exception):
    """Too often. `retry_after`: seconds until the next try can succeed."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RequestRate:
    """At most `per_minute` requests a user, in any 60 seconds."""

    def __init__(self, per_minute: int, clock: Clock = time.monotonic, most_users: int = 10_000) -> None:
        self._windows = _Windows(RateLimitItemPerMinute(per_minute), clock, most_users)

    def hit(self, user: str) -> None:
        """Count one request. Raises LimitExceeded, and then does not count it."""
        self._windows.hit("too many requests in a minute", user)


class LoginGuard:
    """At most `attempts` wrong passwords for one user name from one address, in any `window` seconds.

    A try is counted before its password is looked at and forgiven when it was right: fifty guesses sent at the same
    moment are five guesses too.
    """

    def __init__(
        self, attempts: int = 5, window: int = 900, clock: Clock = time.monotonic, most_pairs: int = 10_000
    ) -> None:
        self._windows = _Windows(RateLimitItemPerSecond(attempts, window), clock, most_pairs)

    def attempt(self, address: str, name: str) -> None:
        """Count one try. Raises LimitExceeded when there were too many wrong ones."""
        self._windows.hit("too many wrong passwords", _network(address), name)

    def succeeded(self, address: str, name: str) -> None:
        """The password was right: forget this pair."""
        self._windows.forget(_network(address), name)


class StreamLimit:
    """At most `most` open streams a user."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._open: Counter[str] = Counter()
        self._lock = threading.Lock()

    def take(self, user: str) -> Callable[[], None]:
        """Count one stream; returns what gives it back (any number of times, from any thread).

        Raises LimitExceeded: when a place becomes free nobody knows, so it says to look again in a second.
        """
        with self._lock:
            if self._open[user] >= self._most:
                raise LimitExceeded("too many streams at once", 1.0)
            self._open[user] += 1
        once = [user]
        return lambda: self._give_back(once)

    def _give_back(self, once: list[str]) -> None:
        with self._lock:
            if once:
                user = once.pop()
                self._open[user] -= 1
                if not self._open[user]:
                    del self._open[user]


class _Windows:
    """The moving windows of one limit, each named by some words of any length."""

    def __init__(self, item: RateLimitItem, clock: Clock, most: int) -> None:
        self._item = item
        self._clock = clock
        self._limiter = MovingWindowRateLimiter(_BoundedStorage(clock, most))

    def hit(self, complaint: str, *words: str) -> None:
        name = _digest(words)
        if not self._limiter.hit(self._item, name):
            opens_again = self._limiter.get_window_stats(self._item, name).reset_time
            raise LimitExceeded(complaint, max(opens_again - self._clock(), 0.001))

    def forget(self, *words: str) -> None:
        self._limiter.clear(self._item, _digest(words))


class _BoundedStorage(MemoryStorage):
    """limits' storage in memory, but with our clock, one lock, and at most `most` windows: the stalest goes first.

    The library's own reads the wall clock, starts a timer thread after a hit, and keeps every name that a guesser
    invents for the whole window.
    """

    def __init__(self, clock: Clock, most: int) -> None:
        super().__init__()
        self._clock = clock
        self._most = most
        self._hits: OrderedDict[str, deque[float]] = OrderedDict()
        self._lock = threading.Lock()

    def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        with self._lock:
            hits = self._current(key, expiry)
            if len(hits) + amount > limit:
                return False
            hits.extend([self._clock()] * amount)
            self._hits[key] = hits
            self._hits.move_to_end(key)
            while len(self._hits) > self._most:
                self._hits.popitem(last=False)
            return True

    def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:
        with self._lock:
            hits = self._current(key, expiry)
            return (hits[0] if hits else self._clock()), len(hits)

    def clear(self, key: str) -> None:
        with self._lock:
            self._hits.pop(key, None)

    def _current(self, key: str, expiry: int) -> deque[float]:
        hits = self._hits.get(key) or deque()
        while hits and hits[0] <= self._clock() - expiry:
            hits.popleft()
        return hits


def _digest(words: tuple[str, ...]) -> str:
    """A name of fixed length; a tuple's repr keeps ("ab", "c") and ("a", "bc") apart."""
    return hashlib.sha256(repr(words).encode("utf-8", "backslashreplace")).hexdigest()


def _network(address: str) -> str:
    """The address, or the /64 around an IPv6 one: a household owns all of it, so one guesser would have 2^64 tries."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv6Address):
        return str(ip.ipv4_mapped or ipaddress.ip_network((ip, 64), strict=False))
    return str(ip)
