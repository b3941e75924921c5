"""Slows down guessing at passwords: failures are counted, and a device that has logged in before is told apart."""

from __future__ import annotations

import ipaddress
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from hmac import compare_digest
from secrets import token_hex
from threading import Condition
from typing import Any

from limits import RateLimitItem, RateLimitItemPerSecond
from limits.storage import MemoryStorage, RedisStorage
from limits.strategies import MovingWindowRateLimiter
from redis import Redis

from crypto import mac
from errors import Overloaded, RateLimited, Unauthorized

Ask = Callable[..., Any]  # RedisLink.ask, which returns None for a command that Redis does not answer

_WINDOW = 900  # seconds
# Wrong passwords in any window. Memory stays small: two Argon2 hashes at once fail at most 30,000 times in it.
_PAIR = RateLimitItemPerSecond(5, _WINDOW, "pair")  # for one name from one address
_DEVICE = RateLimitItemPerSecond(5, _WINDOW, "device")  # for one name from a device that has logged in before
_NAME = RateLimitItemPerSecond(50, _WINDOW, "name")  # for one name from new devices anywhere
_ADDRESS = RateLimitItemPerSecond(100, _WINDOW, "address")  # for any names: an office behind one address mistypes too
_TOLD = RateLimitItemPerSecond(1, 60, "told")


class TooManyFailures(RateLimited):
    """first: none from this address was told of within a minute; audit records of the rest would fill the disk."""

    def __init__(self, retry_after: float, first: bool) -> None:
        super().__init__("Too many wrong passwords: try again later.", retry_after=retry_after)
        self.first = first


class LoginGuard:
    """Counts in Redis while it answers, else in memory.

    key: signs device cookies. places: attempts that may wait at once; an address may hold as many as it leaves free.
    """

    def __init__(self, key: bytes, places: int, shared: tuple[Redis, Ask] | None = None) -> None:
        self._key, self._places = key, places
        self._held: Counter[str] = Counter()
        self._busy: set[str] = set()  # names whose password is being checked
        self._changed = Condition()
        self._local = MovingWindowRateLimiter(MemoryStorage())
        if shared:
            self._shared = MovingWindowRateLimiter(RedisStorage("redis://", connection_pool=shared[0].connection_pool))
        self._ask = shared[1] if shared else lambda *_: None

    @contextmanager
    def attempt(self, address: str, name: str, cookies: Mapping[str, str]) -> Iterator[None]:
        """One attempt to log in. An Unauthorized that leaves it is counted. Raises TooManyFailures, Overloaded.

        Attempts at one name take turns, so that fifty guesses sent at the same moment are five guesses too.
        """
        network = _network(address)
        buckets = self._buckets(network, name, cookies)
        with self._turn(network, name):
            for bucket in buckets:
                if not self._count("test", *bucket):
                    reset = self._count("get_window_stats", *bucket).reset_time
                    first = self._count("hit", _TOLD, network)
                    raise TooManyFailures(max(reset - time.time(), 1.0), first)
            try:
                yield
            except Unauthorized:
                for bucket in buckets:
                    self._count("hit", *bucket)
                raise
            self._count("clear", *buckets[0])

    def device_cookie(self, name: str, device: str = "") -> tuple[str, str]:
        """Name and value of the cookie that tells a device, by default a new one, where `name` has logged in."""
        device = device or token_hex(16)
        return f"device_{self._mac('name', name)[:16]}", f"{device}.{self._mac(name, device)}"

    def _buckets(self, network: str, name: str, cookies: Mapping[str, str]) -> list[tuple[RateLimitItem, str]]:
        """What counts an attempt: the device that a valid cookie names, else the address and the name."""
        sent = cookies.get(self.device_cookie(name)[0], "")
        device = sent.partition(".")[0]
        if sent.isascii() and compare_digest(sent, self.device_cookie(name, device)[1]):
            return [(_DEVICE, self._mac(name, device))]
        return [(_PAIR, self._mac(network, name)), (_NAME, self._mac(name)), (_ADDRESS, self._mac(network))]

    def _mac(self, *parts: str) -> str:
        return mac(self._key, *(part.encode("utf-8", "surrogatepass") for part in parts))

    @contextmanager
    def _turn(self, network: str, name: str) -> Iterator[None]:
        with self._changed:
            if self._held[network] >= self._places - self._held.total():
                raise Overloaded("Too many logins are waiting already.", retry_after=1)
            self._held[network] += 1
            self._changed.wait_for(lambda: name not in self._busy)
            self._busy.add(name)
        try:
            yield
        finally:
            with self._changed:
                self._busy.discard(name)
                self._held[network] -= 1
                self._held += Counter()  # drops the zeros
                self._changed.notify_all()

    def _count(self, operation: str, item: RateLimitItem, who: str) -> Any:
        """What the limiter says. Without Redis, what is lost are the failures of the last minutes."""
        shared = self._ask(lambda: getattr(self._shared, operation)(item, who), "logins")
        return getattr(self._local, operation)(item, who) if shared is None else shared


def _network(address: str) -> str:
    """The address, or the /64 around an IPv6 one: a household owns all of it, so one guesser would have 2^64 tries."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv6Address):
        return str(ip.ipv4_mapped or ipaddress.ip_network((ip, 64), strict=False))
    return str(ip)
