"""Accounts by name: added, looked up, changed and removed; and the tables of all that belongs to one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from secrets import token_hex
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, bindparam, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from accounts.roles import Role
from db import Database, metadata
from errors import Conflict, InvalidRequest, NotFound

# ASCII only: no letter of another alphabet can pass for one of these, and no control character gets in.
NAME = r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}"

# Sorted by their bytes, as SQLite does, whatever the locale of the server.
_NAME = sa.String(64).with_variant(sa.String(64, collation="C"), "postgresql")
# Times are Unix seconds.
users = sa.Table(
    "users",
    metadata,
    sa.Column("id", sa.String(32), primary_key=True),  # random: the next account of a name inherits nothing
    sa.Column("name", _NAME, nullable=False, unique=True),
    sa.Column("role", sa.String(16), nullable=False),
    sa.Column("password_hash", sa.Text, nullable=False),
    sa.Column("disabled", sa.Boolean, nullable=False, default=False),
    # The user's own limits; NULL is what the role has.
    sa.Column("streams", sa.Integer),
    sa.Column("rpm", sa.Integer),
    sa.Column("tokens_per_day", sa.BigInteger),
)
sessions = sa.Table(
    "sessions",
    metadata,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("user_id", sa.String(32), sa.ForeignKey("users.id", ondelete="CASCADE"), nullable=False, index=True),
    sa.Column("refresh", sa.String(32), nullable=False),  # the jti of the one refresh token that is good
    sa.Column("expires", sa.Double, nullable=False, index=True),
    sa.Column("ends", sa.Double, nullable=False),  # no refresh prolongs the session beyond this
)
api_keys = sa.Table(
    "api_keys",
    metadata,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("user_id", sa.String(32), sa.ForeignKey("users.id", ondelete="CASCADE"), nullable=False, index=True),
    sa.Column("jti_hash", sa.String(64), nullable=False, unique=True),
    sa.Column("name", sa.String(64), nullable=False),
    sa.Column("scopes", sa.String(256), nullable=False),
    sa.Column("role", sa.String(16), nullable=False),
    sa.Column("created", sa.Double, nullable=False),
    sa.Column("expires", sa.Double, nullable=False, index=True),
)


@dataclass(frozen=True, slots=True)
class UserLimits:
    """What one user is given; None is what the role has."""

    streams: int | None = None
    rpm: int | None = None
    tokens_per_day: int | None = None


_AS_THE_ROLE = UserLimits()


@dataclass(frozen=True, slots=True)
class User:
    """One account. `id` is random and owns everything; `name` is exact: Admin is not admin."""

    id: str
    name: str
    role: str
    password_hash: str
    disabled: bool = False
    limits: UserLimits = _AS_THE_ROLE


_BY_NAME = select(users).where(users.c.name == bindparam("name"))
# PostgreSQL locks these rows, so that two admins cannot remove each other at the same moment.
_KEPT = users.c.role.in_((Role.ADMIN, Role.AUDITOR)) & ~users.c.disabled
_KEPT_ROLES = select(users.c.role).where(_KEPT).with_for_update()


class Users:
    """The accounts in a database. Changing a missing one raises NotFound; anything may raise StoreUnavailable."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def add(self, name: str, role: str, password_hash: str, limits: UserLimits = _AS_THE_ROLE) -> User:
        """Make an account. Raises InvalidRequest for an impossible name, Conflict for a taken one."""
        if not re.fullmatch(NAME, name):
            words = "A user name is 1 to 64 of A-Z a-z 0-9 . _ @ - and begins with a letter or a digit."
            raise InvalidRequest(words, param="username")
        user = User(token_hex(16), name, role, password_hash, limits=limits)
        columns = asdict(user)
        columns |= columns.pop("limits")
        with self._db.transaction() as connection:
            try:
                connection.execute(insert(users), columns)
            except IntegrityError:
                raise Conflict("The user name is taken.", param="username") from None
        return user

    def get(self, name: str) -> User | None:
        """The account; None where there is none of this name."""
        with suppress(NotFound):
            return self.require(name)
        return None

    def require(self, name: str) -> User:
        """The account. Raises NotFound."""
        with self._db.reading() as connection:
            return _find(connection, name)

    def page(self, after: str = "", count: int = 100) -> list[User]:
        """The accounts whose names follow `after`, in order of their names."""
        names = select(users).where(users.c.name > after).order_by(users.c.name).limit(count)
        with self._db.reading() as connection:
            return [_user(row) for row in connection.execute(names)]

    def change(self, name: str, **columns: object) -> User:
        """Change some columns, all or none. Returns the account as it is then.

        A new password ends every session. Another role, and being disabled, end the API keys too, and for good: an
        account that is enabled again starts without them. Raises Conflict for the last admin or auditor.
        """
        with self._keeping_roles() as connection:
            before = _find(connection, name)
            if columns:
                connection.execute(update(users).where(users.c.id == before.id).values(**columns))
            after = _find(connection, name)
            rights = after.role != before.role or after.disabled > before.disabled
            if rights or after.password_hash != before.password_hash:
                connection.execute(delete(sessions).where(sessions.c.user_id == before.id))
            if rights:
                connection.execute(delete(api_keys).where(api_keys.c.user_id == before.id))
        return after

    def delete(self, name: str) -> None:
        """Remove an account with its sessions and keys. Raises Conflict for the last admin or auditor."""
        with self._keeping_roles() as connection:
            connection.execute(delete(users).where(users.c.id == _find(connection, name).id))

    @contextmanager
    def _keeping_roles(self) -> Iterator[Connection]:
        """A transaction that is undone when it takes away the last active admin or auditor."""
        with self._db.transaction() as connection:
            before = set(connection.scalars(_KEPT_ROLES))
            yield connection
            if lost := before - set(connection.scalars(_KEPT_ROLES)):
                raise Conflict(f"This is the last {lost.pop()}: make another one first.")


def _find(connection: Connection, name: str) -> User:
    row = re.fullmatch(NAME, name) and connection.execute(_BY_NAME, {"name": name}).one_or_none()
    if row is None:
        raise NotFound("No such user.", param="name")
    return _user(row)


def _user(row: Any) -> User:
    id, name, role, password_hash, disabled, *limits = row
    return User(id, name, role, password_hash, disabled, UserLimits(*limits))
