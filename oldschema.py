"""The tables of the state database, as the steps that made them.

Holds no query. A published step is never edited: a change is one more step.
"""

from __future__ import annotations

_FIRST = (
    """CREATE TABLE users (
        name TEXT PRIMARY KEY, role TEXT NOT NULL, password_hash TEXT NOT NULL, disabled INTEGER NOT NULL DEFAULT 0
    ) STRICT, WITHOUT ROWID""",
    "CREATE TABLE revoked (jti TEXT PRIMARY KEY, expires REAL NOT NULL) STRICT, WITHOUT ROWID",
    "CREATE INDEX revoked_by_expiry ON revoked (expires)",
    """CREATE TABLE refresh_tokens (
        jti TEXT PRIMARY KEY, family TEXT NOT NULL, owner TEXT NOT NULL, spent INTEGER NOT NULL DEFAULT 0,
        expires REAL NOT NULL
    ) STRICT, WITHOUT ROWID""",
    "CREATE INDEX refresh_tokens_by_family ON refresh_tokens (family)",
    "CREATE INDEX refresh_tokens_by_expiry ON refresh_tokens (expires)",
    """CREATE TABLE api_keys (
        id TEXT PRIMARY KEY, jti_hash TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, name TEXT NOT NULL,
        scopes TEXT NOT NULL, role TEXT NOT NULL, created REAL NOT NULL, expires REAL NOT NULL, last_used REAL,
        revoked INTEGER NOT NULL DEFAULT 0
    ) STRICT, WITHOUT ROWID""",
    "CREATE INDEX api_keys_by_owner ON api_keys (owner)",
    """CREATE TABLE tickets (
        id_hash TEXT PRIMARY KEY, owner TEXT NOT NULL, body BLOB NOT NULL, expires REAL NOT NULL
    ) STRICT""",
    "CREATE INDEX tickets_by_expiry ON tickets (expires)",
)

_LIMITS = (
    # A user's own limits; NULL is what the role has.
    "ALTER TABLE users ADD COLUMN streams INTEGER",
    "ALTER TABLE users ADD COLUMN rpm INTEGER",
    "ALTER TABLE users ADD COLUMN tokens_per_day INTEGER",
    # Days count from 1970 in UTC. A reservation is what one generation may still take.
    """CREATE TABLE days (
        owner TEXT NOT NULL, day INTEGER NOT NULL, tokens INTEGER NOT NULL, PRIMARY KEY (owner, day)
    ) STRICT, WITHOUT ROWID""",
    """CREATE TABLE reservations (
        id TEXT PRIMARY KEY, owner TEXT NOT NULL, day INTEGER NOT NULL, tokens INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID""",
    "CREATE INDEX reservations_by_owner ON reservations (owner, day)",
)

STATE = (_FIRST, _LIMITS)
