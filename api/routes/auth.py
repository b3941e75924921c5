"""Logging in and out, one's own password, and API keys.

Stores no password and no token: hashes and identifiers only, and not here.
"""

from __future__ import annotations

import time
from secrets import token_hex

from flask import Response, request
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag

from accounts.roles import Permission
from accounts.state import ApiKey
from accounts.tokens import TokenType
from accounts.users import User
from api import accounts, bearer
from api.audit_events import record
from api.context import current, services
from api.errors import ErrorBody
from api.metering import allow, count_request
from api.middleware import SECURED, Reply, needs, principal, public
from api.schemas.accounts import PasswordBody
from api.schemas.native import IdPath, KeyBody, KeyOut, KeysOut, LoginBody, NewKeyOut, TokensOut
from errors import InvalidRequest, NotFound, Unauthorized

_DAY = 86_400
_MOST_KEYS = 100  # that work at the same time, for one user
_KEY_SCOPES = (Permission.GENERATE.value, Permission.READ_MODELS.value)  # a key can never make another key

blueprint = APIBlueprint(
    "auth",
    __name__,
    abp_tags=[Tag(name="Log in")],
    abp_responses={code: ErrorBody for code in (400, 401, 403, 413, 415, 422, 429, 503)},
)


@blueprint.post("/login", responses={200: TokensOut})
@public
def login(body: LoginBody) -> Reply:
    """Tokens for a name and a password. Wrong name and wrong password are answered alike."""
    user = _known(body.username, body.password)
    record(user.name, "login", role=user.role)
    return _session(user)


@blueprint.post("/refresh", security=SECURED, responses={200: TokensOut})
@public  # it asks for a refresh token instead
def refresh() -> Reply:
    """New tokens for a refresh token (in the Authorization header), which is then spent."""
    rooms, claims = services(), bearer.claims(TokenType.REFRESH)
    user = rooms.users.get(claims["sub"])
    if user is None or user.disabled:
        raise Unauthorized("The token is no longer valid.", code="invalid_token")
    allow(user)
    count_request(user.name)
    now, seconds = time.time(), rooms.policy.refresh_ttl
    token, jti = bearer.mint(TokenType.REFRESH, claims["sub"], seconds)
    family = rooms.state.rotate(claims["jti"], jti, now + seconds, now)
    if family is None:
        raise Unauthorized("The token is no longer valid.", code="invalid_token")
    return _tokens(user, token, family)


@blueprint.post("/logout", security=SECURED, responses={204: None})
@needs(Permission.END_SESSION)
def logout() -> Reply:
    """End this session: its access and its refresh tokens."""
    caller, state = principal(), services().state
    record(caller.owner, "logout")
    state.revoke(caller.jti, caller.expires, time.time())
    if caller.family is not None:
        state.end_family(caller.family)
    return Response(status=204)


@blueprint.post("/password", security=SECURED, responses={200: TokensOut})
@needs(Permission.CHANGE_PASSWORD)
def change_password(body: PasswordBody) -> Reply:
    """Change one's own password: every session ends, and the tokens of a new one come back. Keys stay."""
    name = _known(principal().owner, body.current_password).name
    return _session(accounts.change(name, name, body.new_password))


@blueprint.post("/keys", security=SECURED, responses={201: NewKeyOut})
@needs(Permission.MANAGE_KEYS)
def add_key(body: KeyBody) -> Reply:
    """A long-lived token for a program, shown this once."""
    caller, now = principal(), time.time()
    if len(_living_keys(caller.owner)) >= _MOST_KEYS:
        raise InvalidRequest(f"You have {_MOST_KEYS} keys already: revoke one first.", code="too_many_keys")
    seconds = body.expires_in_days * _DAY
    token, jti = bearer.mint(TokenType.KEY, caller.owner, seconds)
    key = ApiKey(token_hex(8), caller.owner, body.name, _KEY_SCOPES, caller.role, now, now + seconds)
    record(caller.owner, "key added", key=key.id, expires_in_days=body.expires_in_days)
    services().state.add_key(jti, key)
    return NewKeyOut(**_shown(key).model_dump(), key=token).model_dump(), 201


@blueprint.get("/keys", security=SECURED, responses={200: KeysOut})
@needs(Permission.MANAGE_KEYS)
def list_keys() -> Reply:
    """One's own keys that still work, without the tokens."""
    return KeysOut(keys=[_shown(key) for key in _living_keys(principal().owner)]).model_dump()


@blueprint.delete("/keys/<id>", security=SECURED, responses={204: None, 404: ErrorBody})
@needs(Permission.MANAGE_KEYS)
def drop_key(path: IdPath) -> Reply:
    """Revoke one of one's own keys, at once."""
    record(principal().owner, "key revoked", key=path.id)
    if not services().state.revoke_key(path.id, principal().owner):
        raise NotFound("You have no key of this id.", param="id")
    return Response(status=204)


def _known(name: str, password: str) -> User:
    """The account of these credentials. Guesses are counted, also those of somebody who found a token."""
    rooms, address = services(), request.remote_addr or ""
    with rooms.guesses.take():
        rooms.logins.attempt(address, name)
        user = rooms.users.get(name)
        right = rooms.passwords.verify(user.password_hash if user else None, password)
    if user is None or not right or user.disabled:
        record(user.name if user else None, "login refused")  # an unknown name may be a password, typed one field early
        raise Unauthorized("Wrong user name or password.", code="wrong_credentials")
    rooms.logins.succeeded(address, name)
    return user


def _session(user: User) -> dict[str, object]:
    """A new session's tokens; none if the password was changed while it was being checked."""
    rooms, now, seconds = services(), time.time(), services().policy.refresh_ttl
    token, jti = bearer.mint(TokenType.REFRESH, user.name, seconds)
    family = rooms.state.start_family(jti, user.name, now + seconds, now)
    known = rooms.users.get(user.name)
    if known is None or known.password_hash != user.password_hash:
        rooms.state.end_family(family)
        raise Unauthorized("Wrong user name or password.", code="wrong_credentials")
    return _tokens(user, token, family)


def _living_keys(owner: str) -> list[ApiKey]:
    now = time.time()
    return [key for key in services().state.keys(owner) if not key.revoked and key.expires > now]


def _tokens(user: User, refresh_token: str, family: str) -> dict[str, object]:
    seconds = int(services().policy.access_ttl)
    access, _ = bearer.mint(TokenType.ACCESS, user.name, seconds, role=user.role, family=family)
    current().user = user.name
    return TokensOut(access_token=access, refresh_token=refresh_token, expires_in=seconds).model_dump()


def _shown(key: ApiKey) -> KeyOut:
    return KeyOut(id=key.id, name=key.name, created_at=key.created, expires_at=key.expires)
