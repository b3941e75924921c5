"""How many wrong passwords one address may try for one name."""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Callable

Count = Callable[[str, int, int], object]  # of a name, a limit and a window in seconds


class LoginGuard:
    """At most `attempts` wrong passwords for one user name from one address, in any `window` seconds.

    A try is counted before its password is checked and forgiven when it was right: fifty guesses sent at the same
    moment are five guesses too.
    """

    def __init__(self, hit: Count, forget: Count, attempts: int = 5, window: int = 900) -> None:
        self._hit, self._forget, self._attempts, self._window = hit, forget, attempts, window

    def attempt(self, address: str, name: str) -> None:
        """Count one try. Raises what `hit` raises when there were too many wrong ones."""
        self._hit(_pair(address, name), self._attempts, self._window)

    def succeeded(self, address: str, name: str) -> None:
        """The password was right: forget this pair."""
        self._forget(_pair(address, name), self._attempts, self._window)


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
