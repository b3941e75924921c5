"""Bearer tokens: made and read with flask-jwt-extended; every failure is the same 401."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from flask import Flask, current_app, request
from flask_jwt_extended import JWTManager, create_access_token, decode_token
from flask_jwt_extended.exceptions import JWTExtendedException
from jwt import PyJWTError

from accounts.tokens import LEEWAY, MAX_CHARS, NAME, InvalidToken, TokenPolicy, TokenType
from api.context import services
from errors import Unauthorized

_DECODED = "flask-llm-decoded"  # tokens whose signature was right: a tenth of a cached answer's time went into it


def register(app: Flask, policy: TokenPolicy) -> None:
    """Make `app` sign and check HS256 tokens, from headers only."""
    app.config.update(
        JWT_SECRET_KEY=policy.key,
        JWT_ALGORITHM="HS256",
        JWT_ENCODE_ISSUER=NAME,
        JWT_DECODE_ISSUER=NAME,
        JWT_ENCODE_AUDIENCE=NAME,
        JWT_DECODE_AUDIENCE=NAME,
        JWT_DECODE_LEEWAY=LEEWAY,
        JWT_ACCESS_TOKEN_EXPIRES=False,  # the claims bring `exp`
    )

    def key(header: Mapping[str, object], unverified: Mapping[str, object]) -> bytes:
        """Called before the signature is checked and before missing claims are filled in: the place to miss them."""
        policy.check_header(header)
        policy.check(unverified, time.time())
        return policy.key

    JWTManager(app).decode_key_loader(key)
    app.extensions[_DECODED] = lru_cache(1024)(decode_token)


def mint(kind: TokenType, user_id: str, jti: str, expires: float, **claims: object) -> str:
    """A new token, good until `expires` (Unix seconds)."""
    extra = {**claims, "type": kind.value, "jti": jti, "exp": expires}
    return str(create_access_token(user_id, additional_claims=extra))


def claims(*kinds: TokenType) -> Mapping[str, Any]:
    """The claims of this request's token. Raises Unauthorized unless it is sound and of one of `kinds`."""
    sent = request.authorization
    if sent is None or sent.type != "bearer" or not sent.token:
        raise Unauthorized("Send a token: Authorization: Bearer <token>.")
    try:
        if len(sent.token) > MAX_CHARS:
            raise InvalidToken("too long")
        found: Mapping[str, Any] = current_app.extensions[_DECODED](sent.token)
        services().policy.check(found, time.time())  # a cached one may have expired since
    except (InvalidToken, PyJWTError, JWTExtendedException, ValueError, TypeError, OverflowError, RecursionError):
        raise Unauthorized("The token is not valid.", code="invalid_token") from None
    if found["type"] not in kinds:
        raise Unauthorized("This type of token is not for this address.", code="invalid_token")
    return found
