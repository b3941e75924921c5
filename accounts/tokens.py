"""What a token must say to be believed, beyond its signature.

Does not sign, decode or look anything up. Give it the claims as they were signed: flask-jwt-extended's decoder fills
in a missing `type` and `jti`, so that what it returns cannot be checked for them any more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

MOST_CHARS = 4096  # of an encoded token: ours are about 500, and nothing longer is worth decoding


class InvalidToken(Exception):
    """The token is not ours, not now or not whole. The message names the claim, never its value."""


class TokenType(StrEnum):
    ACCESS = "access"
    REFRESH = "refresh"
    KEY = "key"  # a long-lived API key, looked up in the store on every use


@dataclass(frozen=True, slots=True)
class TokenPolicy:
    """The rules for every token of one service. Lifetimes and `leeway` (between clocks) in seconds."""

    issuer: str
    audience: str
    access_ttl: float
    refresh_ttl: float
    key_ttl_max: float
    leeway: float = 5.0

    def ttl(self, kind: TokenType) -> float:
        """The longest life of a token of this type, in seconds."""
        lives = {TokenType.ACCESS: self.access_ttl, TokenType.REFRESH: self.refresh_ttl}
        return lives.get(kind, self.key_ttl_max)

    def check(self, claims: Mapping[str, object], now: float) -> None:
        """Raise InvalidToken unless every required claim is there, well typed and true at `now` (Unix seconds)."""
        if claims.get("iss") != self.issuer:
            raise InvalidToken("iss is not this service")
        if claims.get("aud") != self.audience:
            raise InvalidToken("aud is not this service")
        _text(claims, "jti", 128)
        _text(claims, "sub", 64)
        self._check_times(claims, _kind(claims), now)

    def check_header(self, header: Mapping[str, object]) -> None:
        """Raise InvalidToken unless the header is exactly ours: no other algorithm, no key hint, no extension."""
        if dict(header) != {"alg": "HS256", "typ": "JWT"}:
            raise InvalidToken("header is not ours")

    def _check_times(self, claims: Mapping[str, object], kind: TokenType, now: float) -> None:
        expires = _number(claims, "exp")
        if expires <= now:
            raise InvalidToken("exp has passed")
        # An honest token of this type cannot live longer, whoever made it: 1e308 is a number too.
        if expires > now + self.ttl(kind) + self.leeway:
            raise InvalidToken("exp is later than this type of token may live")
        for name in ("iat", "nbf"):
            if name in claims and _number(claims, name) > now + self.leeway:
                raise InvalidToken(f"{name} is in the future")


def _kind(claims: Mapping[str, object]) -> TokenType:
    try:
        return TokenType(_text(claims, "type", 16))
    except ValueError:
        raise InvalidToken("type is unknown") from None


def _text(claims: Mapping[str, object], name: str, most: int) -> str:
    value = claims.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= most:
        raise InvalidToken(f"{name} is missing or not a short text")
    return value


def _number(claims: Mapping[str, object], name: str) -> float:
    value = claims.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidToken(f"{name} is missing or not a number")
    if isinstance(value, float) and not math.isfinite(value):  # an int of 400 digits is finite, but no float
        raise InvalidToken(f"{name} is not finite")
    return value
