"""What must be remembered about tokens: revoked ones, refresh families, API keys, stream tickets.

Does not read tokens or clocks: the caller brings the jti and `now` (Unix seconds). Secrets are kept as hashes.
"""

from __future__ import annotations

import hashlib
import hmac
import sqlite3
from contextlib import suppress
from dataclasses import dataclass

from errors import StoreUnavailable
from olddb import Database

_LAST_USED_STEP = 60.0  # seconds; a synced write for every request would cost more than the figure is worth


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A long-lived token's record. `id` is public, the jti is not here. Times in Unix seconds."""

    id: str
    owner: str
    name: str
    scopes: tuple[str, ...]
    role: str
    created: float
    expires: float
    last_used: float | None = None
    revoked: bool = False


@dataclass(frozen=True, slots=True)
class Ticket:
    """A request that waits for its EventSource; `body` is sealed by who put it."""

    owner: str
    body: bytes
    expires: float


class State:
    """Everything may raise StoreUnavailable, which must never be read as "not revoked".

    key: what hashes of API keys and tickets are made with; whoever has the database alone can try none.
    """

    def __init__(self, db: Database, key: bytes) -> None:
        self._db = db
        self._key = key

    def revoke(self, jti: str, expires: float, now: float) -> None:
        """Refuse this token from now on; forgotten once it has expired anyway."""
        with self._db.transaction() as connection:
            connection.execute("DELETE FROM revoked WHERE expires <= ?", (now,))
            connection.execute("INSERT INTO revoked VALUES (?, ?) ON CONFLICT DO NOTHING", (jti, expires))

    def is_revoked(self, jti: str) -> bool:
        return self._db.row("SELECT 1 FROM revoked WHERE jti = ?", jti) is not None

    def start_family(self, jti: str, owner: str, expires: float, now: float) -> str:
        """Remember a login's first refresh token. Returns the family: the first jti names it."""
        with self._db.transaction() as connection:
            connection.execute("DELETE FROM refresh_tokens WHERE expires <= ?", (now,))
            _add_refresh(connection, jti, jti, owner, expires)
        return jti

    def rotate(self, jti: str, new_jti: str, expires: float, now: float) -> str | None:
        """Spend one refresh token for the next. Returns the family, or None: unknown, expired, revoked or spent.

        A spent token that comes back was stolen, by the one who came first or by this one: the family ends.
        """
        with self._db.transaction() as connection:
            sql = "SELECT family, owner, spent FROM refresh_tokens WHERE jti = ? AND expires > ?"
            row = connection.execute(sql, (jti, now)).fetchone()
            if row is None:
                return None
            if row["spent"]:
                connection.execute("DELETE FROM refresh_tokens WHERE family = ?", (row["family"],))
                return None
            connection.execute("UPDATE refresh_tokens SET spent = 1 WHERE jti = ?", (jti,))
            _add_refresh(connection, new_jti, row["family"], row["owner"], expires)
            return str(row["family"])

    def family_alive(self, family: str, now: float) -> bool:
        """Whether some token of the family can still be refreshed: its access tokens are good no longer than that."""
        sql = "SELECT 1 FROM refresh_tokens WHERE family = ? AND NOT spent AND expires > ?"
        return self._db.row(sql, family, now) is not None

    def end_family(self, family: str) -> None:
        """Log out: no token of the family refreshes again."""
        self._db.write("DELETE FROM refresh_tokens WHERE family = ?", family)

    def add_key(self, jti: str, key: ApiKey) -> None:
        """Remember a new API key; those of the same owner that expired before it was made are forgotten."""
        row = (key.id, self._hash(jti), key.owner, key.name, " ".join(key.scopes), key.role, key.created, key.expires)
        with self._db.transaction() as connection:
            connection.execute("DELETE FROM api_keys WHERE owner = ? AND expires <= ?", (key.owner, key.created))
            sql = "INSERT INTO api_keys (id, jti_hash, owner, name, scopes, role, created, expires) VALUES "
            connection.execute(sql + "(?, ?, ?, ?, ?, ?, ?, ?)", row)

    def keys(self, owner: str) -> list[ApiKey]:
        """The owner's keys, oldest first, revoked ones among them."""
        return [_key(row) for row in self._db.rows("SELECT * FROM api_keys WHERE owner = ? ORDER BY created", owner)]

    def use_key(self, jti: str, now: float) -> ApiKey | None:
        """The key of this token, if it is alive, and note that it was used."""
        row = self._db.row(
            "SELECT * FROM api_keys WHERE jti_hash = ? AND NOT revoked AND expires > ?", self._hash(jti), now
        )
        if row is None:
            return None
        if row["last_used"] is None or now - row["last_used"] >= _LAST_USED_STEP:
            with suppress(StoreUnavailable):  # the key was read and is good: a full disk must not refuse it
                self._db.write("UPDATE api_keys SET last_used = ? WHERE id = ?", now, row["id"])
        return _key(row)

    def revoke_key(self, id: str, owner: str) -> bool:
        """Whether there was a living key of that id, of this owner."""
        sql = "UPDATE api_keys SET revoked = 1 WHERE id = ? AND owner = ? AND NOT revoked"
        return self._db.write(sql, id, owner) > 0

    def put_ticket(self, id: str, owner: str, body: bytes, expires: float, now: float) -> None:
        """Keep a sealed request until it is taken or expires."""
        with self._db.transaction() as connection:
            connection.execute("DELETE FROM tickets WHERE expires <= ?", (now,))
            connection.execute("INSERT INTO tickets VALUES (?, ?, ?, ?)", (self._hash(id), owner, body, expires))

    def take_ticket(self, id: str, now: float) -> Ticket | None:
        """The ticket, once: deleting and reading are one statement, so two takers cannot both have it."""
        with self._db.transaction() as connection:
            sql = "DELETE FROM tickets WHERE id_hash = ? RETURNING owner, body, expires"
            row = connection.execute(sql, (self._hash(id),)).fetchone()
        return None if row is None or row["expires"] <= now else Ticket(row["owner"], row["body"], row["expires"])

    def _hash(self, secret: str) -> str:
        """What is stored instead of a jti or a ticket's id."""
        return hmac.new(self._key, secret.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()


def _add_refresh(connection: sqlite3.Connection, jti: str, family: str, owner: str, expires: float) -> None:
    sql = "INSERT INTO refresh_tokens (jti, family, owner, expires) VALUES (?, ?, ?, ?)"
    connection.execute(sql, (jti, family, owner, expires))


def _key(row: sqlite3.Row) -> ApiKey:
    scopes = tuple(row["scopes"].split())
    times = (row["created"], row["expires"], row["last_used"])
    return ApiKey(row["id"], row["owner"], row["name"], scopes, row["role"], *times, bool(row["revoked"]))
