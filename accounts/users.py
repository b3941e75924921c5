"""The accounts.

Does not hash passwords and does not know what a role may do.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import TypedDict, Unpack

from olddb import Database

# ASCII only: no letter of another alphabet can pass for one of these, and no control character gets in.
NAME = r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}"
_NAME = re.compile(NAME)
_SESSIONS = ("refresh_tokens", "tickets")
_COLUMNS = "name, role, password_hash, disabled, streams, rpm, tokens_per_day"


@dataclass(frozen=True, slots=True)
class OwnLimits:
    """What one user is given; None is what the role has."""

    streams: int | None = None
    rpm: int | None = None
    tokens_per_day: int | None = None


_AS_THE_ROLE = OwnLimits()


@dataclass(frozen=True, slots=True)
class User:
    """One account. `name` is exact: Admin is not admin."""

    name: str
    role: str
    password_hash: str
    disabled: bool = False
    limits: OwnLimits = _AS_THE_ROLE


class Changes(TypedDict, total=False):
    """What of an account may change: its columns."""

    password_hash: str
    role: str
    disabled: bool
    streams: int | None
    rpm: int | None
    tokens_per_day: int | None


class UserExists(ValueError):
    """The name is taken."""


class UnknownUser(LookupError):
    """There is no account of this name."""


class LastOfRole(ValueError):
    """The change would leave nobody of the role that is always needed."""


def check_name(name: str) -> None:
    """Raise ValueError for a name that no account can have."""
    if not _NAME.fullmatch(name):
        raise ValueError("a user name is 1 to 64 of A-Z a-z 0-9 . _ @ - and begins with a letter or a digit")


class Users:
    """Accounts by name. Everything may raise StoreUnavailable; changing a missing account raises UnknownUser.

    needed: a role that somebody who is not disabled always keeps, or nobody could let anybody in again.
    """

    def __init__(self, db: Database, needed: str = "admin") -> None:
        self._db, self._needed = db, needed

    def add(self, name: str, role: str, password_hash: str, limits: OwnLimits = _AS_THE_ROLE) -> User:
        """Make an account. Raises ValueError for an impossible name, UserExists for a taken one."""
        check_name(name)
        sql = f"INSERT INTO users ({_COLUMNS}) VALUES (?, ?, ?, 0, ?, ?, ?) ON CONFLICT DO NOTHING"
        if not self._db.write(sql, name, role, password_hash, *astuple(limits)):
            raise UserExists("the user name is taken")
        return User(name, role, password_hash, limits=limits)

    def get(self, name: str) -> User | None:
        """The account, or None: also for a name that no account can have."""
        if not _NAME.fullmatch(name):
            return None
        row = self._db.row(f"SELECT {_COLUMNS} FROM users WHERE name = ?", name)
        return None if row is None else _user(row)

    def page(self, after: str = "", most: int = 100) -> list[User]:
        """The accounts whose names follow `after`, in order of their names."""
        sql = f"SELECT {_COLUMNS} FROM users WHERE name > ? ORDER BY name LIMIT ?"
        return [_user(row) for row in self._db.rows(sql, after, most)]

    def count(self) -> int:
        return int(self._db.rows("SELECT count(*) FROM users")[0][0])

    def change(self, name: str, **columns: Unpack[Changes]) -> User:
        """Change some columns, all or none. Returns the account as it is then. Raises LastOfRole.

        A new password ends every session: whoever knew the old one is out. A lost role, and being disabled, end the
        API keys too, and for good: an account that is let in again starts without them.
        """
        with self._changing() as connection:
            before = _require(connection, name)
            assignments = ", ".join(f"{column} = ?" for column in columns)
            if columns:
                connection.execute(f"UPDATE users SET {assignments} WHERE name = ?", (*columns.values(), name))
            after = _require(connection, name)
            rights = after.role != before.role or after.disabled > before.disabled
            if rights or after.password_hash != before.password_hash:
                _end_sessions(connection, name)
            if rights:
                connection.execute("UPDATE api_keys SET revoked = 1 WHERE owner = ?", (name,))
        return after

    def delete(self, name: str) -> None:
        """Takes keys, sessions and tickets along, or the next account of that name would inherit them."""
        with self._changing() as connection:
            _require(connection, name)
            connection.execute("DELETE FROM users WHERE name = ?", (name,))
            connection.execute("DELETE FROM api_keys WHERE owner = ?", (name,))
            _end_sessions(connection, name)

    @contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that is undone when it takes away the last one of the needed role."""
        with self._db.transaction() as connection:
            before = self._somebody(connection)
            yield connection
            if before and not self._somebody(connection):
                raise LastOfRole(f"this is the last {self._needed}")

    def _somebody(self, connection: sqlite3.Connection) -> bool:
        sql = "SELECT 1 FROM users WHERE role = ? AND NOT disabled LIMIT 1"
        return connection.execute(sql, (self._needed,)).fetchone() is not None


def _require(connection: sqlite3.Connection, name: str) -> User:
    row = connection.execute(f"SELECT {_COLUMNS} FROM users WHERE name = ?", (name,)).fetchone()
    if row is None:
        raise UnknownUser("no such user")
    return _user(row)


def _user(row: sqlite3.Row) -> User:
    limits = OwnLimits(row["streams"], row["rpm"], row["tokens_per_day"])
    return User(row["name"], row["role"], row["password_hash"], bool(row["disabled"]), limits)


def _end_sessions(connection: sqlite3.Connection, name: str) -> None:
    for table in _SESSIONS:
        connection.execute(f"DELETE FROM {table} WHERE owner = ?", (name,))
