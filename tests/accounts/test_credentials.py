"""Sessions and API keys, on both databases."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from secrets import token_hex
from typing import Any

import pytest
from sqlalchemy import event, func, select

from accounts import credentials as module
from accounts.credentials import ApiKey, Credentials, Principal, Session
from accounts.users import User, UserLimits, Users, api_keys, sessions
from db import Database
from errors import InvalidRequest

NOW = 1_800_000_000.0
DAY = 86_400


@pytest.fixture
def credentials(database: Database) -> Credentials:
    return Credentials(database, b"key", refresh_ttl=7 * DAY)


@pytest.fixture
def ann(database: Database) -> User:
    return Users(database).add("ann", "user", "hash", UserLimits(rpm=9))


@pytest.fixture
def bob(database: Database) -> User:
    return Users(database).add("bob", "user", "hash")


def new_key(
    credentials: Credentials, user: User, scopes: tuple[str, ...] = (), expires: float = NOW + 1000, now: float = NOW
) -> tuple[ApiKey, str]:
    key = ApiKey(token_hex(8), "laptop", now, expires)
    return key, credentials.add_key(user.id, user.role, key, scopes)


def access(user: User, session: Session | None, **changes: Any) -> dict[str, Any]:
    """The claims of an access token."""
    assert session is not None
    return {"type": "access", "jti": "j", "sub": user.id, "sid": session.id, "exp": NOW + 900, **changes}


def key_claims(user: User, jti: str, **changes: Any) -> dict[str, Any]:
    return {"type": "key", "jti": jti, "sub": user.id, "exp": NOW + 1000, **changes}


def count(db: Database, table: Any) -> int:
    with db.reading() as connection:
        return int(connection.scalar(select(func.count()).select_from(table)) or 0)


def test_one_statement_tells_who_a_session_is(credentials: Credentials, ann: User, database: Database) -> None:
    session = credentials.start_session(ann, NOW)
    said: list[str] = []
    with database.reading() as connection:
        engine = connection.engine
    event.listen(engine, "before_cursor_execute", lambda c, cursor, sql, *rest: said.append(sql))
    found = credentials.find(access(ann, session), NOW)
    assert found == Principal(ann.id, "ann", "user", UserLimits(rpm=9), NOW + 900, session_id=session.id)
    assert credentials.still_stands(found, NOW)
    assert len(said) == 2 and all(sql.startswith("SELECT") for sql in said), "one look-up each"


def test_a_session_of_another_user_or_of_none_is_nobodys(credentials: Credentials, ann: User, bob: User) -> None:
    session = credentials.start_session(ann, NOW)
    for changes in ({"sub": bob.id}, {"sid": "0" * 32}, {"sid": None}):
        assert credentials.find(access(ann, session, **changes), NOW) is None


def test_a_refresh_token_is_good_once_and_a_reused_one_ends_its_session_alone(
    credentials: Credentials, ann: User
) -> None:
    session, other = credentials.start_session(ann, NOW), credentials.start_session(ann, NOW)
    second = credentials.rotate(session.id, session.refresh, NOW)
    third = credentials.rotate(session.id, second.refresh, NOW)
    assert third.id == session.id and credentials.find(access(ann, session), NOW)
    assert credentials.rotate(session.id, second.refresh, NOW) is None
    assert credentials.rotate(session.id, third.refresh, NOW) is None, "the thief's, or the victim's, is dead too"
    assert credentials.find(access(ann, session), NOW) is None
    assert credentials.find(access(ann, other), NOW) is not None


def test_unknown_expired_and_logged_out_sessions_are_refused(credentials: Credentials, ann: User) -> None:
    assert credentials.rotate("none", "none", NOW) is None
    session = credentials.start_session(ann, NOW)
    assert credentials.find(access(ann, session), NOW + 7 * DAY) is None
    assert credentials.rotate(session.id, session.refresh, NOW + 7 * DAY) is None
    session = credentials.start_session(ann, NOW)
    found = credentials.find(access(ann, session), NOW)
    credentials.end_session(session.id)
    assert not credentials.still_stands(found, NOW) and credentials.rotate(session.id, session.refresh, NOW) is None


def test_a_session_ends_after_30_days_however_often_it_is_refreshed(credentials: Credentials, ann: User) -> None:
    session, now = credentials.start_session(ann, NOW), NOW
    for _ in range(9):
        now += 3 * DAY
        session = credentials.rotate(session.id, session.refresh, now)
        assert session.expires == min(now + 7 * DAY, NOW + 30 * DAY)
    assert credentials.find(access(ann, session), NOW + 30 * DAY - 1)
    assert credentials.rotate(session.id, session.refresh, NOW + 30 * DAY) is None


def test_of_many_refreshes_at_once_exactly_one_wins(credentials: Credentials, ann: User) -> None:
    for _ in range(5):
        session = credentials.start_session(ann, NOW)
        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(lambda _, s=session: credentials.rotate(s.id, s.refresh, NOW), range(8)))
        assert sum(result is not None for result in results) == 1


def test_refreshing_leaves_one_row_and_logins_leave_a_hundred(
    credentials: Credentials, ann: User, database: Database
) -> None:
    session = credentials.start_session(ann, NOW)
    for second in range(50):
        session = credentials.rotate(session.id, session.refresh, NOW + second)
    assert count(database, sessions) == 1
    for second in range(module.MAX_SESSIONS):
        last = credentials.start_session(ann, NOW + 60 + second)
    assert count(database, sessions) == module.MAX_SESSIONS
    assert credentials.find(access(ann, session), NOW + 200) is None, "the oldest made room"
    assert credentials.find(access(ann, last), NOW + 200) is not None


def test_expired_rows_are_forgotten_in_bounded_batches(
    credentials: Credentials, ann: User, bob: User, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PRUNED", 10)
    for _ in range(25):
        credentials.start_session(bob, NOW)
        new_key(credentials, bob, expires=NOW + 10)
    left = []
    for second in range(3):
        credentials.start_session(ann, NOW + 8 * DAY + second)
        new_key(credentials, ann, expires=NOW + 9 * DAY, now=NOW + 8 * DAY)
        left.append((count(database, sessions), count(database, api_keys)))
    assert left == [(16, 16), (7, 7), (3, 3)]


@pytest.mark.promise("P18", injected="an account changed while its password is being checked")
@pytest.mark.parametrize("change", [{"password_hash": "new"}, {"disabled": True}])
def test_no_session_for_an_account_that_changed_meanwhile(
    credentials: Credentials, ann: User, database: Database, change: Any, counted: Callable[..., None]
) -> None:
    changed = Users(database).change("ann", **change)
    started = credentials.start_session(ann, NOW)
    counted(changed_accounts=int(changed != ann), sessions=count(database, sessions))
    assert started is None and changed != ann and count(database, sessions) == 0


def test_a_key_works_until_it_is_revoked_or_expires(credentials: Credentials, ann: User, bob: User) -> None:
    key, jti = new_key(credentials, ann, ("generate", "models"))
    found = credentials.find(key_claims(ann, jti), NOW)
    expected = Principal(ann.id, "ann", "user", UserLimits(rpm=9), NOW + 1000, key_id=key.id)
    assert found == replace(expected, scopes=["generate", "models"])
    assert credentials.find(key_claims(ann, "another"), NOW) is None
    assert credentials.find(key_claims(ann, key.id), NOW) is None
    assert credentials.find(key_claims(bob, jti), NOW) is None
    assert credentials.find(key_claims(ann, jti), NOW + 1000) is None
    assert not credentials.revoke_key(key.id, bob.id)
    assert credentials.revoke_key(key.id, ann.id) and not credentials.revoke_key(key.id, ann.id)
    assert credentials.find(key_claims(ann, jti), NOW) is None and not credentials.still_stands(found, NOW)
    assert credentials.keys(ann.id, NOW) == []


def test_a_key_of_the_time_before_accounts_had_ids_names_its_owner(credentials: Credentials, ann: User) -> None:
    _, jti = new_key(credentials, ann)
    assert credentials.find(key_claims(ann, jti, sub="ann"), NOW) is not None


def test_a_user_has_at_most_so_many_keys(
    credentials: Credentials, ann: User, bob: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_KEYS", 2)
    make: Callable[[User], Any] = lambda user: new_key(credentials, user)  # noqa: E731
    key, _ = make(ann)
    make(ann), make(bob)
    with pytest.raises(InvalidRequest) as refused:
        make(ann)
    assert refused.value.code == "too_many_keys"
    credentials.revoke_key(key.id, ann.id)
    make(ann)


def test_no_secret_is_in_the_database(credentials: Credentials, ann: User, database: Database) -> None:
    _, jti = new_key(credentials, ann)
    with database.reading() as connection:
        (row,) = connection.execute(select(api_keys)).all()
    assert row.name == "laptop" and jti not in map(str, row)
