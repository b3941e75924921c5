"""Takes over accounts and API keys from the state.sqlite3 of versions before the SQL database."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from secrets import token_hex

from sqlalchemy import Connection, insert, select

from accounts.users import api_keys, users
from db import Database, failures

# (user_id, day since 1970 in UTC, tokens): settled ones, and those that were reserved when the service ended.
Days = list[tuple[str, int, int]]
_USERS = "SELECT * FROM users"
_KEYS = "SELECT id, owner AS user_id, jti_hash, name, scopes, role, created, expires FROM api_keys WHERE NOT revoked"
_DAYS = """SELECT owner, day, sum(tokens) AS tokens FROM
    (SELECT owner, day, tokens FROM days UNION ALL SELECT owner, day, tokens FROM reservations) GROUP BY owner, day"""


def import_old_state(db: Database, path: Path, add_days: Callable[[Connection, Days], None]) -> bool:
    """Copy what `path` holds into `db`, once, and rename it to `*.imported`. Returns whether there was such a file.

    Everything is one transaction; a start that was cut short before the renaming finds accounts and only renames.
    """
    if not path.exists():
        return False
    with failures(), closing(sqlite3.connect(path)) as old, db.transaction() as connection:
        if connection.execute(select(users.c.id).limit(1)).first() is None:
            add_days(connection, _copy(old, connection))
    for suffix in ("", "-wal", "-shm"):
        if (file := path.with_name(path.name + suffix)).exists():
            file.rename(f"{path}.imported{suffix}")
    return True


def _copy(old: sqlite3.Connection, connection: Connection) -> Days:
    old.row_factory = sqlite3.Row
    accounts = [{**row, "id": token_hex(16), "disabled": bool(row["disabled"])} for row in old.execute(_USERS)]
    ids = {account["name"]: account["id"] for account in accounts}
    keys = [{**row, "user_id": ids[row["user_id"]]} for row in old.execute(_KEYS) if row["user_id"] in ids]
    for table, rows in ((users, accounts), (api_keys, keys)):
        if rows:
            connection.execute(insert(table), rows)
    has_limits = old.execute("PRAGMA user_version").fetchone()[0] >= 2
    days = old.execute(_DAYS) if has_limits else ()
    return [(ids[owner], day, tokens) for owner, day, tokens in days if owner in ids]
