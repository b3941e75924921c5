"""The accounts.

Does not hash passwords and does not know what a role may do.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from store.database import Database

# ASCII only: no letter of another alphabet can pass for one of these, and no control character gets in.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_OWNED = ("refresh_tokens", "api_keys", "tickets")


@dataclass(frozen=True, slots=True)
class User:
    """One account. `name` is exact: Admin is not admin."""

    name: str
    role: str
    password_hash: str
    disabled: bool = False


class UserExists(ValueError):
    """The name is taken."""


class UnknownUser(LookupError):
    """There is no account of this name."""


def check_name(name: str) -> None:
    """Raise ValueError for a name that no account can have."""
    if not _NAME.fullmatch(name):
        raise ValueError("a user name is 1 to 64 of A-Z a-z 0-9 . _ @ - and begins with a letter or a digit")


class Users:
    """Accounts by name. Everything may raise StoreUnavailable; changing a missing account raises UnknownUser."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def add(self, name: str, role: str, password_hash: str) -> User:
        """Make an account. Raises ValueError for an impossible name, UserExists for a taken one."""
        check_name(name)
        sql = "INSERT INTO users (name, role, password_hash) VALUES (?, ?, ?) ON CONFLICT DO NOTHING"
        if not self._db.write(sql, name, role, password_hash):
            raise UserExists("the user name is taken")
        return User(name, role, password_hash)

    def get(self, name: str) -> User | None:
        """The account, or None: also for a name that no account can have."""
        if not _NAME.fullmatch(name):
            return None
        row = self._db.row("SELECT role, password_hash, disabled FROM users WHERE name = ?", name)
        return None if row is None else User(name, row["role"], row["password_hash"], bool(row["disabled"]))

    def count(self) -> int:
        return int(self._db.rows("SELECT count(*) FROM users")[0][0])

    def set_password(self, name: str, password_hash: str) -> None:
        """Also ends every session of the user: whoever knew the old password is out."""
        with self._db.transaction() as connection:
            changed = connection.execute("UPDATE users SET password_hash = ? WHERE name = ?", (password_hash, name))
            _require(changed.rowcount)
            connection.execute("DELETE FROM refresh_tokens WHERE owner = ?", (name,))

    def set_disabled(self, name: str, disabled: bool) -> None:
        _require(self._db.write("UPDATE users SET disabled = ? WHERE name = ?", int(disabled), name))

    def set_role(self, name: str, role: str) -> None:
        _require(self._db.write("UPDATE users SET role = ? WHERE name = ?", role, name))

    def delete(self, name: str) -> None:
        """Takes keys, sessions and tickets along, or the next account of that name would inherit them."""
        with self._db.transaction() as connection:
            _require(connection.execute("DELETE FROM users WHERE name = ?", (name,)).rowcount)
            for table in _OWNED:
                connection.execute(f"DELETE FROM {table} WHERE owner = ?", (name,))


def _require(changed: int) -> None:
    if not changed:
        raise UnknownUser("no such user")
