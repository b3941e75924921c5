"""Passwords: refused when weak, hashed with Argon2id, checked at a steady price, and generated."""

from __future__ import annotations

import secrets
import threading
from contextlib import suppress
from pathlib import Path

from argon2 import PasswordHasher
from argon2.exceptions import VerificationError

from errors import InvalidRequest
from settings import PASSWORD_LONGEST, PASSWORD_SHORTEST

_READABLE = "abcdefghjkmnpqrstuvwxyz23456789"  # without i, l, o, 0, 1
_COMMON = frozenset((Path(__file__).parent / "common_passwords.txt").read_text().split())


class Passwords:
    """Argon2id with RFC 9106's second recommendation: 64 MiB a hash, so at most two run together."""

    def __init__(self, hasher: PasswordHasher | None = None) -> None:
        self._hasher = hasher or PasswordHasher()
        self._running = threading.BoundedSemaphore(2)
        self._unknown = self.hash(secrets.token_urlsafe(32))

    def hash(self, password: str) -> str:
        """The text to store: parameters, salt and hash."""
        with self._running:
            return self._hasher.hash(_encoded(password))

    def verify(self, stored: str | None, password: str) -> bool:
        """Whether `password` is the one of `stored`; None is a user that does not exist.

        Costs one Argon2 verification either way, so that the time taken does not tell which names exist.
        """
        with self._running, suppress(VerificationError, ValueError):  # another password, or a damaged hash
            return self._hasher.verify(stored or self._unknown, _encoded(password)) and stored is not None
        return False


def check_strength(password: str, name: str) -> None:
    """Raise InvalidRequest for one that is too short or long, or that a guesser tries first (NIST SP 800-63B)."""
    if not PASSWORD_SHORTEST <= len(password) <= PASSWORD_LONGEST:
        words = f"A password has {PASSWORD_SHORTEST} to {PASSWORD_LONGEST} characters."
        raise InvalidRequest(words, code="weak_password", param="password")
    plain = password.strip().casefold()
    if len(set(plain)) < 2 or plain == name.casefold() or plain in _COMMON:
        words = "This password is among the first that a guesser tries: choose another one."
        raise InvalidRequest(words, code="weak_password", param="password")


def generate() -> str:
    """A random password of 99 bits that can be read aloud: four groups of five letters and digits."""
    return "-".join("".join(secrets.choice(_READABLE) for _ in range(5)) for _ in range(4))


def _encoded(password: str) -> bytes:
    """Never fails: JSON can carry half a surrogate pair, which plain UTF-8 refuses."""
    return password.encode("utf-8", "surrogatepass")
