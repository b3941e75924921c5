"""The table of permissions, row by row."""

from __future__ import annotations

import pytest

from accounts.roles import Permission, Role, allowed

HELD = {
    Role.ADMIN: {"generate", "models", "keys", "session", "password", "users"},
    Role.USER: {"generate", "models", "keys", "session", "password"},
    Role.AUDITOR: {"models", "session", "password", "audit"},
}


@pytest.mark.parametrize("permission", list(Permission))
@pytest.mark.parametrize("role", list(Role))
def test_a_role_holds_its_permissions_and_no_other(role: Role, permission: Permission) -> None:
    assert allowed(role, permission) == allowed(role.value, permission.value) == (permission in HELD[role])


@pytest.mark.parametrize("role", ["", "Admin", "root", "admin "])
def test_an_unknown_role_may_nothing(role: str) -> None:
    assert not any(allowed(role, permission) for permission in Permission)


def test_an_unknown_permission_is_denied_to_all() -> None:
    assert not any(allowed(role, "shutdown") or allowed(role, "shutdown", ["shutdown"]) for role in Role)


def test_scopes_narrow_and_never_widen() -> None:
    assert allowed(Role.USER, Permission.GENERATE, ["generate"])
    assert not allowed(Role.USER, Permission.MANAGE_KEYS, ["generate"])
    assert not allowed(Role.USER, Permission.GENERATE, [])
    assert not allowed(Role.AUDITOR, Permission.GENERATE, ["generate"])
