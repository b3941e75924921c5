"""Logging in and out, one's own password, and API keys."""

from __future__ import annotations

import re
import time
from secrets import token_hex

from flask import Response, jsonify, request

from accounts.credentials import Session
from accounts.guard import TooManyFailures
from accounts.roles import Permission
from accounts.tokens import TokenType
from accounts.users import User
from api import accounts, bearer
from api.audit_events import record
from api.context import current, services
from api.errors import ErrorBody
from api.middleware import SECURED, Reply, api_blueprint, count_request, enter, needs, principal, public
from api.schemas.accounts import KeyBody, KeyOut, KeysOut, LoginBody, NewKeyOut, PasswordBody, TokensOut
from api.schemas.native import IdPath
from errors import NotFound, Unauthorized

_DEVICE_AGE = 180 * 86_400  # seconds
_LOOPBACK = re.compile(r"(localhost|127\.[\d.]+|\[::1\])(:\d+)?")

blueprint = api_blueprint("auth", "Log in", 400, 401, 403, 413, 415, 422, 429, 503, secured=False)


@blueprint.post("/login", responses={200: TokensOut})
@public
def login(body: LoginBody) -> Reply:
    """Tokens for a name and a password. Wrong name and wrong password are answered alike."""
    user = _authenticate(body.username, body.password)
    record(user.name, "login", role=user.role)
    return _signed_in(user)


@blueprint.post("/refresh", security=SECURED, responses={200: TokensOut})
@public  # it asks for a refresh token instead
def refresh() -> Reply:
    """New tokens for a refresh token (in the Authorization header), which is then spent."""
    claims = bearer.claims(TokenType.REFRESH)
    caller = enter(claims)
    count_request(caller)
    session = services().credentials.rotate(claims["sid"], claims["jti"], time.time())
    if session is None:
        raise Unauthorized("The token is no longer valid.", code="invalid_token")
    return _tokens(caller.user_id, session)


@blueprint.post("/logout", security=SECURED, responses={204: None})
@needs(Permission.END_SESSION)
def logout() -> Reply:
    """End this session: its access and its refresh tokens."""
    record(principal().name, "logout")
    services().credentials.end_session(principal().session_id or "")
    return Response(status=204)


@blueprint.post("/password", security=SECURED, responses={200: TokensOut})
@needs(Permission.CHANGE_PASSWORD)
def change_password(body: PasswordBody) -> Reply:
    """Change one's own password: every session ends, and the tokens of a new one come back. Keys stay."""
    caller = principal()
    _authenticate(caller.name, body.current_password)
    return _signed_in(accounts.change(caller, caller.name, body.new_password))


@blueprint.post("/keys", security=SECURED, responses={201: NewKeyOut})
@needs(Permission.MANAGE_KEYS)
def add_key(body: KeyBody) -> Reply:
    """A long-lived token for a program, shown this once."""
    key, token = accounts.add_key(principal(), principal(), body.name, body.expires_in_days)
    return {**KeyOut.model_validate(key).model_dump(), "key": token}, 201


@blueprint.get("/keys", security=SECURED, responses={200: KeysOut})
@needs(Permission.MANAGE_KEYS)
def list_keys() -> Reply:
    """One's own keys that still work, without the tokens."""
    return KeysOut(keys=services().credentials.keys(principal().user_id, time.time())).model_dump()


@blueprint.delete("/keys/<id>", security=SECURED, responses={204: None, 404: ErrorBody})
@needs(Permission.MANAGE_KEYS)
def drop_key(path: IdPath) -> Reply:
    """Revoke one of one's own keys, at once."""
    record(principal().name, "key revoked", key=path.id)
    if not services().credentials.revoke_key(path.id, principal().user_id):
        raise NotFound("You have no key of this id.", param="id")
    return Response(status=204)


def _authenticate(name: str, password: str) -> User:
    """The account of these credentials. Raises Unauthorized, and TooManyFailures after some wrong ones."""
    found = services()
    try:
        with found.guard.attempt(request.remote_addr or "", name, request.cookies):
            user = found.users.get(name)
            right = found.passwords.verify(user.password_hash if user else None, password)
            if user is None or not right or user.disabled:
                raise Unauthorized("Wrong user name or password.", code="wrong_credentials")
            return user
    except (Unauthorized, TooManyFailures) as refusal:
        if not isinstance(refusal, TooManyFailures) or refusal.first:
            known = found.users.get(name)  # an unknown name may be a password, typed one field early
            record(known.name if known else None, "login refused", code=refusal.code)
        raise


def _signed_in(user: User) -> Response:
    """A new session's tokens; none if the account was changed while its password was being checked."""
    session = services().credentials.start_session(user, time.time())
    if session is None:
        raise Unauthorized("Wrong user name or password.", code="wrong_credentials")
    current().user, current().user_id = user.name, user.id
    response = jsonify(_tokens(user.id, session))
    cookie, path = services().guard.device_cookie(user.name), request.script_root + "/"
    secure = not _LOOPBACK.fullmatch(request.host)
    response.set_cookie(*cookie, _DEVICE_AGE, path=path, secure=secure, httponly=True, samesite="Strict")
    return response


def _tokens(user_id: str, session: Session) -> dict[str, object]:
    seconds = int(services().policy.access_ttl)
    access = bearer.mint(TokenType.ACCESS, user_id, token_hex(16), time.time() + seconds, sid=session.id)
    renewal = bearer.mint(TokenType.REFRESH, user_id, session.refresh, session.expires, sid=session.id)
    return TokensOut(access_token=access, refresh_token=renewal, expires_in=seconds).model_dump()
