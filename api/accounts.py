"""What may be done to accounts, for the routes and for the command line alike; each change leaves a line in the log.

Asks nobody whether they may; whoever calls has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Unpack

import structlog

from api.services import services
from security.passwords import generate
from store.users import Changes, OwnLimits, User

log = structlog.get_logger("accounts")


@dataclass(frozen=True, slots=True)
class Made:
    """An account, and the password that was made up for it because none was given: shown once, stored nowhere."""

    user: User
    password: str | None


def add(by: str, name: str, role: str, password: str | None, limits: OwnLimits) -> Made:
    """A new account. Raises UserExists, and ValueError for an impossible name."""
    rooms, made = services(), None if password else generate()
    user = rooms.users.add(name, role, rooms.passwords.hash(password or made or ""), limits)
    log.info("account added", by=by, account=name, role=role)
    return Made(user, made)


def change(by: str, name: str, password: str | None = None, **columns: Unpack[Changes]) -> User:
    """The account as it is after the change. Raises UnknownUser and LastOfRole."""
    rooms = services()
    if password is not None:
        columns["password_hash"] = rooms.passwords.hash(password)
    user = rooms.users.change(name, **columns)
    log.info("account changed", by=by, account=name, changed=sorted(columns))
    return user


def remove(by: str, name: str) -> None:
    """Raises UnknownUser and LastOfRole."""
    services().users.delete(name)
    log.info("account removed", by=by, account=name)
