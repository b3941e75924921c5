"""What each role may do: one table."""

from __future__ import annotations

from collections.abc import Collection
from enum import StrEnum


class Role(StrEnum):
    ADMIN = "admin"
    USER = "user"
    AUDITOR = "auditor"


class Permission(StrEnum):
    """One thing that a route asks for. The value is also the name of an API key's scope."""

    GENERATE = "generate"  # generate, stream, tickets, and cancelling one's own requests
    READ_MODELS = "models"
    MANAGE_KEYS = "keys"  # one's own
    END_SESSION = "session"  # log out
    CHANGE_PASSWORD = "password"  # one's own
    MANAGE_USERS = "users"
    READ_AUDIT = "audit"


# Admins cannot read what is recorded about them and others; auditors, who can, run nothing.
_ALL = frozenset({Permission.READ_MODELS, Permission.END_SESSION, Permission.CHANGE_PASSWORD})
_USER = _ALL | {Permission.GENERATE, Permission.MANAGE_KEYS}
_TABLE: dict[str, frozenset[Permission]] = {
    Role.ADMIN: _USER | {Permission.MANAGE_USERS},
    Role.USER: _USER,
    Role.AUDITOR: _ALL | {Permission.READ_AUDIT},
}


def allowed(role: Role | str, permission: Permission | str, scopes: Collection[str] | None = None) -> bool:
    """Whether `role` holds `permission`, within `scopes` when a token carries some. Unknown names are denied."""
    return permission in _TABLE.get(role, frozenset()) and (scopes is None or permission in scopes)
