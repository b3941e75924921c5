"""Passwords: hashed with Argon2id, checked at a steady price, and made up where there is none yet.

Does not know users, and says nothing about why a password was refused.
"""

from __future__ import annotations

import secrets
import threading

from argon2 import PasswordHasher
from argon2.exceptions import VerificationError

_READABLE = "abcdefghjkmnpqrstuvwxyz23456789"  # without i, l, o, 0, 1


class Passwords:
    """Argon2id with RFC 9106's second recommendation: 64 MiB a hash, so at most `at_once` run together."""

    def __init__(self, hasher: PasswordHasher | None = None, at_once: int = 2) -> None:
        self._hasher = hasher or PasswordHasher()
        self._running = threading.BoundedSemaphore(at_once)
        self._nobody = self.hash(secrets.token_urlsafe(32))

    def hash(self, password: str) -> str:
        """The text to store: parameters, salt and hash."""
        with self._running:
            return self._hasher.hash(_encoded(password))

    def verify(self, stored: str | None, password: str) -> bool:
        """Whether `password` is the one of `stored`; None is a user that does not exist.

        Costs one Argon2 verification either way, so that the time taken does not tell which names exist.
        """
        with self._running:
            try:
                matches = self._hasher.verify(self._nobody if stored is None else stored, _encoded(password))
            except (VerificationError, ValueError):  # another password, or a damaged hash
                return False
        return matches and stored is not None


def generate() -> str:
    """A random password of 99 bits that can be read aloud: four groups of five letters and digits."""
    return "-".join("".join(secrets.choice(_READABLE) for _ in range(5)) for _ in range(4))


def _encoded(password: str) -> bytes:
    """Never fails: JSON can carry half a surrogate pair, which plain UTF-8 refuses."""
    return password.encode("utf-8", "surrogatepass")
