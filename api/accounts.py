"""What may be done to accounts, for the routes and for the command line alike; each change leaves a line in the log.

Asks nobody whether they may; whoever calls has.
"""

from __future__ import annotations

from typing import Unpack

import structlog

from accounts.users import Changes, OwnLimits, User
from api.audit_events import record
from api.context import services

log = structlog.get_logger("accounts")


def add(by: str, name: str, role: str, password: str, limits: OwnLimits) -> User:
    """A new account. Raises UserExists, and ValueError for an impossible name."""
    rooms = services()
    record(by, "account added", account=name, role=role)
    user = rooms.users.add(name, role, rooms.passwords.hash(password), limits)
    log.info("account added", by=by, account=name, role=role)
    return user


def change(by: str, name: str, password: str | None = None, **columns: Unpack[Changes]) -> User:
    """The account as it is after the change. Raises UnknownUser and LastOfRole."""
    rooms = services()
    if password is not None:
        columns["password_hash"] = rooms.passwords.hash(password)
    record(by, "account changed", account=name, changed=sorted(columns))
    user = rooms.users.change(name, **columns)
    log.info("account changed", by=by, account=name, changed=sorted(columns))
    return user


def remove(by: str, name: str) -> None:
    """Raises UnknownUser and LastOfRole."""
    record(by, "account removed", account=name)
    services().users.delete(name)
    log.info("account removed", by=by, account=name)
