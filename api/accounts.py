"""What may be done to accounts, by the routes and by the command line; each change is an audit event and a log line."""

from __future__ import annotations

import sys
import time
from secrets import token_hex

import structlog

from accounts.credentials import ApiKey, Principal
from accounts.passwords import check_strength, generate
from accounts.roles import Permission, Role
from accounts.tokens import TokenType
from accounts.users import User, UserLimits
from api import bearer
from api.audit_events import record
from api.context import Services, services
from errors import Conflict, Forbidden, InvalidRequest
from settings import SettingsError

log = structlog.get_logger("accounts")

_KEY_SCOPES = (Permission.GENERATE.value, Permission.READ_MODELS.value)  # a key can never make another key


def add(by: Principal | None, name: str, role: str, password: str, limits: UserLimits) -> User:
    """A new account; `by` None is the command line. Raises Forbidden, InvalidRequest, Conflict."""
    _check_roles(by, role)
    check_strength(password, name)
    _record(by, "account added", account=name, role=role)
    return services().users.add(name, role, services().passwords.hash(password), limits)


def change(by: Principal | None, name: str, password: str | None = None, **columns: object) -> User:
    """The account as it is after the change. Raises Forbidden, InvalidRequest, NotFound, Conflict."""
    found = services()
    if columns or by is None or by.name != name:  # auditors change their own passwords
        _check_roles(by, found.users.require(name).role, str(columns.get("role")))
    if password is not None:
        check_strength(password, name)
        columns["password_hash"] = found.passwords.hash(password)
    _record(by, "account changed", account=name, changed=sorted(columns))
    return found.users.change(name, **columns)


def remove(by: Principal | None, name: str) -> None:
    """Raises Forbidden, NotFound, Conflict."""
    _check_roles(by, services().users.require(name).role)
    _record(by, "account removed", account=name)
    services().users.delete(name)


def add_key(by: Principal | None, owner: User | Principal, name: str, days: int) -> tuple[ApiKey, str]:
    """A new API key and its token, which is not stored. Raises InvalidRequest when the owner has too many."""
    now, user_id = time.time(), owner.id if isinstance(owner, User) else owner.user_id
    key = ApiKey(token_hex(8), name, now, now + days * 86_400)
    _record(by, "key added", account=owner.name, key=key.id, expires_in_days=days)
    jti = services().credentials.add_key(user_id, owner.role, key, _KEY_SCOPES)
    return key, bearer.mint(TokenType.KEY, user_id, jti, key.expires)


def add_first_admin(found: Services, given: str | None) -> None:
    """Make `admin` in a database without accounts; `given` is ADMIN_PASSWORD. Raises SettingsError when it is weak."""
    if found.users.page(count=1):
        return
    password = given or generate()
    try:
        check_strength(password, "admin")
        found.users.add("admin", Role.ADMIN, found.passwords.hash(password))
    except InvalidRequest as error:
        raise SettingsError(f"ADMIN_PASSWORD: {error.message} (for example from: openssl rand -hex 12)") from None
    except Conflict:
        return  # another process was first
    if given is None:
        print(f"First start: sign in as admin with the password {password} (it is not shown again)", file=sys.stderr)


def _check_roles(by: Principal | None, *roles: str) -> None:
    """Only the command line makes, changes and removes auditors: an admin could else read the audit log after all."""
    if by is not None and Role.AUDITOR in roles:
        raise Forbidden("Accounts of auditors are changed on the command line: flask users.")


def _record(by: Principal | None, event: str, **details: object) -> None:
    actor = "command line" if by is None else by.name
    record(actor, event, **details)
    log.info(event, by=actor, **details)
