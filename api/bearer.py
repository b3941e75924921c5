"""Bearer tokens: made and read with flask-jwt-extended, every failure the same 401.

Does not ask what a token allows or whether it was revoked; guards.py does.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta
from functools import lru_cache
from typing import Any
from uuid import uuid4

from flask import Flask, current_app, request
from flask_jwt_extended import JWTManager, create_access_token, decode_token
from flask_jwt_extended.exceptions import JWTExtendedException
from jwt import PyJWTError

from accounts.tokens import MOST_CHARS, InvalidToken, TokenType
from api.context import Services, services
from errors import Unauthorized

_DECODED = "flask-llm-decoded"  # tokens whose signature was right: a tenth of a cached answer's time went into it


def register(app: Flask, rooms: Services) -> None:
    """Make `app` sign and check HS256 tokens of the policy's issuer and audience, from headers only."""
    policy = rooms.policy
    app.config.update(
        JWT_SECRET_KEY=rooms.jwt_key,
        JWT_ALGORITHM="HS256",
        JWT_DECODE_ALGORITHMS=["HS256"],
        JWT_TOKEN_LOCATION=["headers"],
        JWT_ENCODE_ISSUER=policy.issuer,
        JWT_DECODE_ISSUER=policy.issuer,
        JWT_ENCODE_AUDIENCE=policy.audience,
        JWT_DECODE_AUDIENCE=policy.audience,
        JWT_DECODE_LEEWAY=policy.leeway,
    )
    JWTManager(app).decode_key_loader(_key)
    app.extensions[_DECODED] = lru_cache(1024)(decode_token)


def mint(kind: TokenType, owner: str, seconds: float, **claims: object) -> tuple[str, str]:
    """A new token and its jti."""
    jti = uuid4().hex
    extra = {**claims, "type": kind.value, "jti": jti}
    token = create_access_token(owner, expires_delta=timedelta(seconds=seconds), additional_claims=extra)
    return token, jti


def claims(*kinds: TokenType) -> Mapping[str, Any]:
    """The claims of this request's token. Raises Unauthorized unless it is sound and of one of `kinds`."""
    sent = request.authorization
    if sent is None or sent.type != "bearer" or not sent.token:
        raise Unauthorized("Send a token: Authorization: Bearer <token>.")
    try:
        found: Mapping[str, Any] = _decoded(sent.token)
    except (InvalidToken, PyJWTError, JWTExtendedException, ValueError, TypeError, OverflowError, RecursionError):
        raise Unauthorized("The token is not valid.", code="invalid_token") from None
    if found["type"] not in kinds:
        raise Unauthorized("This type of token is not for this address.", code="invalid_token")
    return found


def _decoded(token: str) -> dict[str, Any]:
    if len(token) > MOST_CHARS:
        raise InvalidToken("too long")
    decoded: dict[str, Any] = current_app.extensions[_DECODED](token)
    services().policy.check(decoded, time.time())  # an old acquaintance may have expired since
    return decoded


def _key(header: Mapping[str, object], unverified: Mapping[str, object]) -> bytes:
    """Called before the signature is checked, and before missing claims are filled in: the place to miss them."""
    rooms = services()
    rooms.policy.check_header(header)
    rooms.policy.check(unverified, time.time())
    return rooms.jwt_key
