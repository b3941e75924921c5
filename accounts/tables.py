"""The tables of accounts. migrations/versions/ makes them; times are Unix seconds."""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, Double, ForeignKey, Integer, String, Table, Text

from db import metadata

users = Table(
    "users",
    metadata,
    Column("id", String(32), primary_key=True),  # random: the next account of a name inherits nothing
    Column("name", String(64), nullable=False, unique=True),
    Column("role", String(16), nullable=False),
    Column("password_hash", Text, nullable=False),
    Column("disabled", Boolean, nullable=False, default=False),
    # The user's own limits; NULL is what the role has.
    Column("streams", Integer),
    Column("rpm", Integer),
    Column("tokens_per_day", BigInteger),
)
sessions = Table(
    "sessions",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("user_id", String(32), ForeignKey("users.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("refresh", String(32), nullable=False),  # the jti of the one refresh token that is good
    Column("expires", Double, nullable=False, index=True),
    Column("ends", Double, nullable=False),  # no refresh prolongs the session beyond this
)
api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("user_id", String(32), ForeignKey("users.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("jti_hash", String(64), nullable=False, unique=True),
    Column("name", String(64), nullable=False),
    Column("scopes", String(256), nullable=False),
    Column("role", String(16), nullable=False),
    Column("created", Double, nullable=False),
    Column("expires", Double, nullable=False, index=True),
    Column("last_used", Double),
)
