"""How many wrong passwords one address may try for one name."""

from __future__ import annotations

import hashlib
import ipaddress
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable

from errors import RateLimited

_MAX_PAIRS = 20_000  # invented names must not fill the memory


class LoginGuard:
    """At most `attempts` wrong passwords for one user name from one address, in any `window` seconds.

    A try is counted before its password is checked and forgiven when it was right: fifty guesses sent at the same
    moment are five guesses too.
    """

    def __init__(self, attempts: int = 5, window: float = 900, clock: Callable[[], float] = time.monotonic) -> None:
        self._attempts, self._window, self._clock = attempts, window, clock
        self._tries: OrderedDict[str, deque[float]] = OrderedDict()
        self._lock = threading.Lock()

    def attempt(self, address: str, name: str) -> None:
        """Count one try. Raises RateLimited when there were too many wrong ones."""
        pair = _pair(address, name)
        with self._lock:
            now, tries = self._clock(), self._tries.setdefault(pair, deque())
            self._tries.move_to_end(pair)
            while tries and tries[0] <= now - self._window:
                tries.popleft()
            if len(tries) >= self._attempts:
                raise RateLimited("There were too many wrong passwords.", retry_after=tries[0] + self._window - now)
            tries.append(now)
            if len(self._tries) > _MAX_PAIRS:
                self._tries.popitem(last=False)

    def succeeded(self, address: str, name: str) -> None:
        """The password was right: forget this pair."""
        with self._lock:
            self._tries.pop(_pair(address, name), None)


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
