"""Accounts."""

from __future__ import annotations

from pathlib import Path

import pytest

from store.database import Database
from store.state import ApiKey, State
from store.users import UnknownUser, User, UserExists, Users

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
def db(tmp_path: Path) -> Database:
    return Database(tmp_path / "state.db")


@pytest.fixture
def users(db: Database) -> Users:
    return Users(db)


def test_an_account_is_found_by_its_exact_name(users: Users) -> None:
    assert users.count() == 0
    made = users.add("ann", "user", "hash")
    assert users.get("ann") == made == User("ann", "user", "hash", disabled=False)
    assert users.get("Ann") is None and users.get("bob") is None
    assert users.count() == 1


@pytest.mark.parametrize("name", IMPOSSIBLE, ids=ascii)
def test_an_impossible_name_is_refused_and_never_found(users: Users, name: str) -> None:
    with pytest.raises(ValueError, match="a user name is"):
        users.add(name, "user", "hash")
    assert users.get(name) is None and users.count() == 0


@pytest.mark.parametrize("name", ["a", "A.b_c-d@example.org", "9", "x" * 64])
def test_ordinary_names_are_accepted(users: Users, name: str) -> None:
    assert users.get(users.add(name, "user", "hash").name) is not None


def test_a_taken_name_is_refused_and_its_account_unchanged(users: Users) -> None:
    users.add("ann", "user", "hash")
    with pytest.raises(UserExists):
        users.add("ann", "admin", "other")
    assert users.get("ann") == User("ann", "user", "hash")
    users.add("Ann", "user", "hash")  # another name


def test_password_role_and_state_can_change(users: Users) -> None:
    users.add("ann", "user", "hash")
    users.add("bob", "user", "hash")
    users.set_password("ann", "new")
    users.set_role("ann", "auditor")
    users.set_disabled("ann", True)
    assert users.get("ann") == User("ann", "auditor", "new", disabled=True)
    users.set_disabled("ann", False)
    assert users.get("ann") == User("ann", "auditor", "new") and users.get("bob") == User("bob", "user", "hash")


def test_changing_a_missing_account_is_told(users: Users) -> None:
    for change in (
        lambda: users.set_password("ann", "x"),
        lambda: users.set_role("ann", "x"),
        lambda: users.set_disabled("ann", True),
        lambda: users.delete("ann"),
    ):
        with pytest.raises(UnknownUser):
            change()


def test_a_new_password_ends_the_sessions_of_the_old_one(db: Database, users: Users) -> None:
    state = State(db)
    for name in ("ann", "bob"):
        users.add(name, "user", "hash")
        state.start_family(f"{name}-1", name, 2000, 1000)
    users.set_password("ann", "new")
    assert state.rotate("ann-1", "ann-2", 2000, 1000) is None
    assert state.rotate("bob-1", "bob-2", 2000, 1000) == "bob-1"


def test_the_next_account_of_a_name_inherits_nothing(db: Database, users: Users) -> None:
    state = State(db)
    users.add("ann", "user", "hash")
    state.start_family("f", "ann", 2000, 1000)
    state.add_key("key-jti", ApiKey("k1", "ann", "laptop", (), "user", 1000, 2000))
    state.put_ticket("t", "ann", b"sealed", 2000, 1000)
    users.delete("ann")
    users.add("ann", "user", "hash")
    assert state.rotate("f", "g", 2000, 1000) is None
    assert state.use_key("key-jti", 1000) is None and state.keys("ann") == []
    assert state.take_ticket("t", 1000) is None
