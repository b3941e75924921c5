"""What a token stands for: sessions, and API keys. Secrets are kept as hashes; `now` is in Unix seconds."""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from secrets import token_hex
from typing import Any

from sqlalchemy import Connection, Row, Select, Table, bindparam, delete, insert, select, update

from accounts.users import User, UserLimits, api_keys, sessions, users
from db import Database
from errors import InvalidRequest

MAX_KEYS = 100  # of one user, at the same time
MAX_SESSIONS = 100  # of one user; the oldest ends when another begins
_SESSION_TTL = 30 * 86_400  # seconds, however often it is refreshed
_PRUNED = 100  # expired rows that one write takes along


@dataclass(frozen=True, slots=True)
class Principal:
    """The caller of a request. One of `session_id` and `key_id` is set; `scopes` None means all that the role may.

    expires: of the token.
    """

    user_id: str
    name: str
    role: str
    limits: UserLimits
    expires: float
    session_id: str | None = None
    key_id: str | None = None
    scopes: Sequence[str] | None = None


@dataclass(frozen=True, slots=True)
class Session:
    """A session and its refresh token. `expires` is the token's."""

    id: str
    refresh: str
    expires: float


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A long-lived token's record. `id` is public, the jti is not here."""

    id: str
    name: str
    created: float
    expires: float


_WHO = (users.c.id.label("user_id"), users.c.name.label("user"), *users.c["role", "streams", "rpm", "tokens_per_day"])
_SESSION = select(sessions.c.id, *_WHO).join_from(sessions, users)
_SESSION = _SESSION.where(sessions.c.id == bindparam("id"), sessions.c.expires > bindparam("now"), ~users.c.disabled)
_KEY = select(*api_keys.c["id", "scopes"], *_WHO).join_from(api_keys, users)
_KEY = _KEY.where(api_keys.c.expires > bindparam("now"), api_keys.c.role == users.c.role, ~users.c.disabled)
_KEY_BY_HASH = _KEY.where(api_keys.c.jti_hash == bindparam("hash"))
_KEY_BY_ID = _KEY.where(api_keys.c.id == bindparam("id"))


class Credentials:
    """Everything may raise StoreUnavailable, which must never be read as "revoked" or as "good".

    key: for the hashes of API keys; the database alone is then no way to try one. refresh_ttl: in seconds.
    """

    def __init__(self, db: Database, key: bytes, refresh_ttl: float) -> None:
        self._db, self._key, self._refresh_ttl = db, key, refresh_ttl

    def find(self, claims: Mapping[str, Any], now: float) -> Principal | None:
        """The caller whose token makes these claims, in one statement; None once it is revoked or has expired."""
        if is_key := claims["type"] == "key":
            row = self._row(_KEY_BY_HASH, hash=self._hash(claims["jti"]), now=now)
        else:
            row = self._row(_SESSION, id=str(claims.get("sid")), now=now)
        if row is None or claims["sub"] not in (row.user_id, row.user):  # tokens of old keys hold the name
            return None
        limits = UserLimits(row.streams, row.rpm, row.tokens_per_day)
        caller = Principal(row.user_id, row.user, row.role, limits, float(claims["exp"]))
        if is_key:
            return replace(caller, key_id=row.id, scopes=row.scopes.split())
        return replace(caller, session_id=row.id)

    def still_stands(self, caller: Principal, now: float) -> bool:
        """Whether the caller's session or key is still good, and its owner still holds the same role."""
        statement = _SESSION if caller.key_id is None else _KEY_BY_ID
        row = self._row(statement, id=caller.key_id or caller.session_id, now=now)
        return row is not None and row.role == caller.role

    def start_session(self, user: User, now: float) -> Session | None:
        """A new session; None when the account was changed since `user` was read and its password checked."""
        session = Session(token_hex(16), token_hex(16), now + min(self._refresh_ttl, _SESSION_TTL))
        unchanged = select(users.c.id).where(
            users.c.id == user.id, users.c.password_hash == user.password_hash, ~users.c.disabled
        )
        mine = select(sessions.c.id).where(sessions.c.user_id == user.id)
        oldest = mine.order_by(sessions.c.ends.desc()).offset(MAX_SESSIONS - 1)
        with self._db.transaction() as connection:
            if connection.execute(unchanged.with_for_update()).one_or_none() is None:
                return None
            _prune(connection, sessions, now)
            connection.execute(delete(sessions).where(sessions.c.id.in_(oldest)))
            columns = {**asdict(session), "user_id": user.id, "ends": now + _SESSION_TTL}
            connection.execute(insert(sessions), columns)
        return session

    def rotate(self, id: str, refresh: str, now: float) -> Session | None:
        """Replace a session's refresh token by the next one; None when the session is over.

        A token that comes back after its turn was stolen, by whoever used it first or by this caller: the session ends.
        """
        this = sessions.c.id == id
        current = select(sessions.c.ends).where(this, sessions.c.refresh == refresh, sessions.c.expires > now)
        with self._db.transaction() as connection:
            ends = connection.scalar(current.with_for_update())
            if ends is None:
                connection.execute(delete(sessions).where(this))
                return None
            session = Session(id, token_hex(16), min(now + self._refresh_ttl, ends))
            connection.execute(update(sessions).where(this).values(asdict(session)))
        return session

    def end_session(self, id: str) -> None:
        with self._db.transaction() as connection:
            connection.execute(delete(sessions).where(sessions.c.id == id))

    def add_key(self, user_id: str, role: str, key: ApiKey, scopes: Sequence[str]) -> str:
        """Remember a new API key. Returns the jti of its token. Raises InvalidRequest when the user has too many."""
        jti = token_hex(16)
        columns = {**asdict(key), "user_id": user_id, "role": role, "scopes": " ".join(scopes)}
        with self._db.transaction() as connection:
            _prune(connection, api_keys, key.created)
            if len(_keys(connection, user_id, key.created)) >= MAX_KEYS:
                raise InvalidRequest(f"You have {MAX_KEYS} keys already: revoke one first.", code="too_many_keys")
            connection.execute(insert(api_keys), {**columns, "jti_hash": self._hash(jti)})
        return jti

    def keys(self, user_id: str, now: float) -> list[ApiKey]:
        """The user's keys that still work, oldest first."""
        with self._db.reading() as connection:
            return _keys(connection, user_id, now)

    def revoke_key(self, id: str, user_id: str) -> bool:
        """Whether this user had a key of that id."""
        with self._db.transaction() as connection:
            mine = delete(api_keys).where(api_keys.c.id == id, api_keys.c.user_id == user_id)
            return connection.execute(mine).rowcount > 0

    def _row(self, statement: Select[Any], **values: object) -> Row[Any] | None:
        with self._db.reading() as connection:
            return connection.execute(statement, values).one_or_none()

    def _hash(self, jti: str) -> str:
        return hmac.digest(self._key, jti.encode("utf-8", "surrogatepass"), "sha256").hex()


def _keys(connection: Connection, user_id: str, now: float) -> list[ApiKey]:
    mine = select(*api_keys.c["id", "name", "created", "expires"]).order_by(api_keys.c.created)
    good = mine.where(api_keys.c.user_id == user_id, api_keys.c.expires > now)
    return [ApiKey(*row) for row in connection.execute(good)]


def _prune(connection: Connection, table: Table, now: float) -> None:
    expired = select(table.c.id).where(table.c.expires <= now).limit(_PRUNED)
    connection.execute(delete(table).where(table.c.id.in_(expired)))
