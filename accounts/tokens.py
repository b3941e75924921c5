"""What a token must say to be believed, beyond its signature.

Check the claims as they were signed: flask-jwt-extended's decoder fills in a missing `type` and `jti`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, FiniteFloat, StringConstraints, ValidationError

NAME = "flask-llm"  # issuer and audience
MAX_CHARS = 4096  # of an encoded token: ours are about 400, and nothing longer is worth decoding
LEEWAY = 5.0  # seconds between clocks
KEY_TTL = 366 * 86_400

_Text = Annotated[str, StringConstraints(min_length=1, max_length=128)]
_Seconds = int | FiniteFloat


class InvalidToken(Exception):
    """The token is not ours, not valid now, or incomplete. The message names the claim, never its value."""


class TokenType(StrEnum):
    ACCESS = "access"
    REFRESH = "refresh"
    KEY = "key"  # a long-lived API key


class _Claims(BaseModel):
    model_config = ConfigDict(strict=True)

    iss: Literal["flask-llm"]
    aud: Literal["flask-llm"]
    sub: _Text
    jti: _Text
    type: Literal["access", "refresh", "key"]
    exp: _Seconds
    iat: _Seconds = 0
    nbf: _Seconds = 0


@dataclass(frozen=True, slots=True)
class TokenPolicy:
    """The signing key, and the lifetimes of tokens in seconds."""

    key: bytes
    access_ttl: float
    refresh_ttl: float

    def ttl(self, kind: str) -> float:
        """The longest life of a token of this type, in seconds."""
        return {TokenType.ACCESS: self.access_ttl, TokenType.REFRESH: self.refresh_ttl}.get(TokenType(kind), KEY_TTL)

    def check(self, claims: Mapping[str, object], now: float) -> None:
        """Raise InvalidToken unless every required claim is there, well typed and true at `now` (Unix seconds)."""
        try:
            found = _Claims.model_validate(claims)
        except ValidationError as error:
            raise InvalidToken(f"{error.errors(include_input=False)[0]['loc'][0]} is missing or wrong") from None
        if found.exp <= now:
            raise InvalidToken("exp has passed")
        # An honest token of this type cannot live longer, whoever made it: 1e308 is a number too.
        if found.exp > now + self.ttl(found.type) + LEEWAY:
            raise InvalidToken("exp is later than this type of token may live")
        for name in ("iat", "nbf"):
            if getattr(found, name) > now + LEEWAY:
                raise InvalidToken(f"{name} is in the future")

    def check_header(self, header: Mapping[str, object]) -> None:
        """Raise InvalidToken unless the header is exactly ours: no other algorithm, no key hint, no extension."""
        if dict(header) != {"alg": "HS256", "typ": "JWT"}:
            raise InvalidToken("header is not ours")
