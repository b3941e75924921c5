"""Accounts."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from accounts.credentials import ApiKey, Credentials
from accounts.users import User, UserLimits, Users
from db import Database
from errors import Conflict, InvalidRequest, NotFound

CYRILLIC, FULL_WIDTH = "\u0430nn", "\uff21nn"  # both look like ann
IMPOSSIBLE = [
    "",
    CYRILLIC,
    FULL_WIDTH,
    "é",
    "\ud800",
    "nul\x00",
    "ann ",
    " ann",
    "ann\n",
    "-ann",
    "a/b",
    "a'--",
    "x" * 65,
]


@pytest.fixture
def users(database: Database) -> Users:
    return Users(database)


def test_an_account_is_found_by_its_exact_name(users: Users) -> None:
    assert len(users.page()) == 0
    made = users.add("ann", "user", "hash")
    assert users.get("ann") == made == User(made.id, "ann", "user", "hash", disabled=False)
    assert len(made.id) == 32 != len(made.name)
    assert users.get("Ann") is None and users.get("bob") is None
    assert len(users.page()) == 1


@pytest.mark.parametrize("name", IMPOSSIBLE, ids=ascii)
def test_an_impossible_name_is_refused_and_never_found(users: Users, name: str) -> None:
    with pytest.raises(InvalidRequest, match="A user name is"):
        users.add(name, "user", "hash")
    assert users.get(name) is None and len(users.page()) == 0


@pytest.mark.parametrize("name", ["a", "A.b_c-d@example.org", "9", "x" * 64])
def test_ordinary_names_are_accepted(users: Users, name: str) -> None:
    assert users.get(users.add(name, "user", "hash").name) is not None


def test_a_taken_name_is_refused_and_its_account_unchanged(users: Users) -> None:
    ann = users.add("ann", "user", "hash")
    with pytest.raises(Conflict, match="taken"):
        users.add("ann", "admin", "other")
    assert users.get("ann") == ann
    users.add("Ann", "user", "hash")  # another name


def test_everything_but_the_name_can_change(users: Users) -> None:
    id = users.add("ann", "user", "hash", UserLimits(rpm=5)).id
    bob = users.add("bob", "user", "hash")
    changed = users.change("ann", password_hash="new", role="admin", disabled=True, rpm=None, streams=3)
    assert changed == users.get("ann") == User(id, "ann", "admin", "new", True, UserLimits(streams=3))
    assert users.change("ann", disabled=False) == User(id, "ann", "admin", "new", False, UserLimits(streams=3))
    assert users.change("bob") == users.get("bob") == bob


def test_changing_a_missing_account_is_told(users: Users) -> None:
    for change in (lambda: users.change("ann", role="x"), lambda: users.change("ann"), lambda: users.delete("ann")):
        with pytest.raises(NotFound, match="No such user"):
            change()


def test_accounts_are_read_by_the_page(users: Users) -> None:
    for name in ("carl", "ann", "bob", "Zed"):
        users.add(name, "user", "hash")
    assert [user.name for user in users.page()] == ["Zed", "ann", "bob", "carl"]
    assert [user.name for user in users.page("ann", 1)] == ["bob"]
    assert users.page("carl") == []


def test_the_last_admin_stays(users: Users) -> None:
    ann = users.add("ann", "admin", "hash")
    users.add("bob", "admin", "hash")
    users.add("carl", "user", "hash")
    users.change("bob", disabled=True)
    changes = (
        lambda: users.change("ann", role="user"),
        lambda: users.change("ann", disabled=True, password_hash="new"),
        lambda: users.delete("ann"),
    )
    for change in changes:
        with pytest.raises(Conflict, match="last admin"):
            change()
    assert users.get("ann") == ann, "a change was half made"
    users.delete("carl")
    users.change("bob", disabled=False)
    users.delete("ann")


def test_of_two_admins_who_disable_each_other_at_once_one_stays(users: Users) -> None:
    for _ in range(10):
        for name in ("ann", "bob"):
            if users.get(name) is None:
                users.add(name, "admin", "hash")
            users.change(name, disabled=False)
        start = threading.Barrier(2)

        def disable(name: str, start: threading.Barrier = start) -> bool:
            start.wait(10)
            try:
                return users.change(name, disabled=True).disabled
            except Conflict:
                return False

        with ThreadPoolExecutor(2) as pool:
            assert sorted(pool.map(disable, ["ann", "bob"])) == [False, True]


def test_the_last_auditor_stays_too(users: Users) -> None:
    users.add("ann", "auditor", "hash")
    with pytest.raises(Conflict, match="last auditor"):
        users.change("ann", role="admin")
    users.add("bob", "auditor", "hash")
    users.delete("ann")


@pytest.mark.promise("P18", injected="each change of an account")
@pytest.mark.parametrize(
    ("change", "session", "key"),
    [
        ({"password_hash": "new"}, False, True),
        ({"disabled": True}, False, False),
        ({"role": "auditor"}, False, False),
        ({"role": "user", "disabled": False, "password_hash": "hash", "rpm": 9}, True, True),
    ],
    ids=["password", "disabled", "role", "nothing of weight"],
)
def test_sessions_end_with_the_password_and_keys_with_the_rights(
    database: Database,
    users: Users,
    change: dict[str, Any],
    session: bool,
    key: bool,
    counted: Callable[..., None],
) -> None:
    credentials = Credentials(database, b"key", 1000)
    users.add("kept", "auditor", "hash")
    ann, bob = users.add("ann", "user", "hash"), users.add("bob", "user", "hash")
    sessions = [credentials.start_session(user, 1000) for user in (ann, bob)]
    made = ApiKey("k", "laptop", 1000, 2000)
    credentials.add_key(ann.id, "user", made, ())
    users.change("ann", **change)
    users.change("ann", role="user", disabled=False)  # what was taken does not come back with the rights
    alive = [credentials.rotate(each.id, each.refresh, 1000) is not None for each in sessions]
    keys = credentials.keys(ann.id, 1000)
    counted(sessions_ended=alive.count(False), sessions_kept=alive.count(True))
    counted(keys_ended=int(made not in keys), keys_kept=len(keys))
    assert alive == [session, True]
    assert keys == ([made] if key else [])


def test_the_next_account_of_a_name_inherits_nothing(database: Database, users: Users) -> None:
    credentials = Credentials(database, b"key", 1000)
    first = users.add("ann", "user", "hash")
    session = credentials.start_session(first, 1000)
    jti = credentials.add_key(first.id, "user", ApiKey("k", "laptop", 1000, 2000), ())
    users.delete("ann")
    second = users.add("ann", "user", "hash")
    assert second.id != first.id and credentials.keys(second.id, 1000) == []
    assert credentials.rotate(session.id, session.refresh, 1000) is None
    assert credentials.find({"type": "key", "jti": jti, "sub": first.id, "exp": 2000}, 1000) is None
