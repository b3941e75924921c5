"""Whose limit counts: the user's own, the role's, everybody's."""

from __future__ import annotations

import pytest

from accounts.roles import Role
from accounts.users import UserLimits
from quotas.allowances import Allowance, Allowances
from settings import Settings, SettingsError

EVERYBODY = Allowance(10, 120, 0)
RULES = ("admin.rpm=600", "admin.streams=20", "user.tokens_per_day=5000", "user.tokens_per_day=7000")


@pytest.mark.parametrize(
    ("role", "own", "expected"),
    [
        (Role.AUDITOR, UserLimits(), EVERYBODY),
        (Role.ADMIN, UserLimits(), Allowance(20, 600, 0)),
        (Role.USER, UserLimits(), Allowance(10, 120, 7000)),
        (Role.USER, UserLimits(streams=1, tokens_per_day=0), Allowance(1, 120, 0)),
        (Role.ADMIN, UserLimits(1, 2, 3), Allowance(1, 2, 3)),
        ("no such role", UserLimits(), EVERYBODY),
    ],
)
def test_the_nearest_limit_counts(role: str, own: UserLimits, expected: Allowance) -> None:
    assert Allowances(EVERYBODY, RULES).of(role, own) == expected


def test_roles_are_limited_by_one_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROLE_LIMITS", ", ".join(f"{role}.rpm=1" for role in Role))
    rules = Settings.from_environment().role_limits
    assert {Allowances(EVERYBODY, rules).of(role, UserLimits()).rpm for role in Role} == {1}


@pytest.mark.parametrize("wrong", ["admin", "root.rpm=1", "admin.rpm=0", "admin.rpm=-1", "admin.tpm=1", "admin.rpm=1;"])
def test_a_wrong_rule_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    monkeypatch.setenv("ROLE_LIMITS", f"user.rpm=1,{wrong}")
    with pytest.raises(SettingsError, match=r"^ROLE_LIMITS: .*for example ROLE_LIMITS=admin\.rpm=600"):
        Settings.from_environment()
