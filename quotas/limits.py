"""How often one may ask: requests a minute, streams at once, tokens a day, guesses at a password.

Does not keep the counts, and knows no HTTP status; the caller turns `retry_after` into a header.
"""

from __future__ import annotations

import hashlib
import ipaddress
import time
from collections.abc import Callable
from dataclasses import dataclass
from secrets import token_hex
from typing import Protocol

_MINUTE, _DAY = 60.0, 86_400.0
_SOON = 1.0  # seconds; when a place becomes free nobody knows


@dataclass(frozen=True, slots=True)
class Room:
    """What is left of one limit. `reset`: seconds until there is more."""

    limit: int
    left: int
    reset: float


class LimitExceeded(Exception):
    """Too often. `retry_after`: seconds until the next try can succeed."""

    def __init__(self, message: str, retry_after: float, room: Room | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.room = room


class QuotaExceeded(LimitExceeded):
    """Not before tomorrow: trying again soon is of no use."""


class Windows(Protocol):
    """Counts of what happened lately, by name. Exact, however many threads or processes count at once."""

    def hit(self, name: str, most: int, seconds: float) -> tuple[bool, int, float]:
        """Count one, unless `most` were counted within the last `seconds`.

        Returns whether it was counted, for how many more there is room, and the seconds until there is more.
        """

    def forget(self, name: str) -> None: ...


class Leases(Protocol):
    """Who holds how many of something, by name. A lease that is not kept up for a while may be lost."""

    def take(self, name: str, lease: str, most: int) -> bool:
        """Whether there was room for one more."""

    def keep(self, name: str, lease: str) -> None: ...

    def give_back(self, name: str, lease: str) -> None:
        """Any number of times."""


class Quotas(Protocol):
    """Tokens of a day, by name. What is reserved and never settled stays taken."""

    def reserve(self, name: str, day: int, bill: str, tokens: int, most: int) -> tuple[bool, int, int]:
        """Take `tokens` if they fit beside what is settled and reserved. Returns whether, and both sums."""

    def settle(self, name: str, day: int, bill: str, tokens: int) -> None:
        """Replace a reservation by what was used, once; later calls change nothing."""

    def spent(self, name: str, day: int) -> int:
        """The tokens that are settled."""


class RequestRate:
    """So many requests a user, in any 60 seconds."""

    def __init__(self, windows: Windows) -> None:
        self._windows = windows

    def hit(self, user: str, most: int) -> Room:
        """Count one request. Raises LimitExceeded, and then does not count it."""
        counted, left, reset = self._windows.hit(f"rate:{user}", most, _MINUTE)
        room = Room(most, left, reset)
        if not counted:
            raise LimitExceeded("too many requests in a minute", reset, room)
        return room


class LoginGuard:
    """At most `attempts` wrong passwords for one user name from one address, in any `window` seconds.

    A try is counted before its password is looked at and forgiven when it was right: fifty guesses sent at the same
    moment are five guesses too.
    """

    def __init__(self, windows: Windows, attempts: int = 5, window: float = 900) -> None:
        self._windows, self._attempts, self._window = windows, attempts, window

    def attempt(self, address: str, name: str) -> None:
        """Count one try. Raises LimitExceeded when there were too many wrong ones."""
        counted, _, reset = self._windows.hit(_pair(address, name), self._attempts, self._window)
        if not counted:
            raise LimitExceeded("too many wrong passwords", reset)

    def succeeded(self, address: str, name: str) -> None:
        """The password was right: forget this pair."""
        self._windows.forget(_pair(address, name))


@dataclass(frozen=True, slots=True)
class Lease:
    """One open stream."""

    leases: Leases
    user: str
    id: str

    def keep(self) -> None:
        """Say that it is still open; without a word for a minute it may be counted as closed."""
        self.leases.keep(self.user, self.id)

    def give_back(self) -> None:
        self.leases.give_back(self.user, self.id)


class StreamLimit:
    """So many open streams a user."""

    def __init__(self, leases: Leases) -> None:
        self._leases = leases

    def take(self, user: str, most: int) -> Lease:
        """Count one stream, until it is given back. Raises LimitExceeded."""
        lease = Lease(self._leases, user, token_hex(8))
        if not self._leases.take(user, lease.id, most):
            raise LimitExceeded("too many streams at once", _SOON)
        return lease


@dataclass(frozen=True, slots=True)
class Bill:
    """Tokens reserved for one generation. `room` is what the day has left beside them."""

    quotas: Quotas
    user: str
    day: int
    id: str
    room: Room

    def settle(self, used: int) -> None:
        """Say what it took in the end; the first word counts."""
        self.quotas.settle(self.user, self.day, self.id, used)


class TokenQuota:
    """So many tokens a user, prompts and answers together, from midnight to midnight in UTC."""

    def __init__(self, quotas: Quotas, clock: Callable[[], float] = time.time) -> None:
        self._quotas, self._clock = quotas, clock

    def reserve(self, user: str, tokens: int, most: int) -> Bill:
        """Set aside what a generation may take at most. Raises QuotaExceeded, and LimitExceeded where it may fit soon:
        as soon as others, which have more set aside than they will take, have ended."""
        now = self._clock()
        day, tomorrow = int(now // _DAY), _DAY - now % _DAY
        bill = token_hex(8)
        granted, settled, reserved = self._quotas.reserve(user, day, bill, tokens, most)
        room = Room(most, max(most - settled - reserved, 0), tomorrow)
        if granted:
            return Bill(self._quotas, user, day, bill, room)
        words = f"this request may take {tokens} tokens, and {room.left} of today's {most} are left"
        if settled + tokens > most:
            raise QuotaExceeded(words, tomorrow, room)
        raise LimitExceeded(f"{words} while others of yours run", _SOON, room)

    def spent(self, user: str) -> int:
        """Tokens of today, without those of what still runs."""
        return self._quotas.spent(user, int(self._clock() // _DAY))


def _pair(address: str, name: str) -> str:
    """A name of fixed length; a tuple's repr keeps ("ab", "c") and ("a", "bc") apart."""
    words = repr((_network(address), name)).encode("utf-8", "backslashreplace")
    return f"login:{hashlib.sha256(words).hexdigest()}"


def _network(address: str) -> str:
    """The address, or the /64 around an IPv6 one: a household owns all of it, so one guesser would have 2^64 tries."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv6Address):
        return str(ip.ipv4_mapped or ipaddress.ip_network((ip, 64), strict=False))
    return str(ip)
