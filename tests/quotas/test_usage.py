"""Tokens a day and recorded usage, on SQLite and PostgreSQL, on a clock that the test turns."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import text

from db import Database
from errors import StoreUnavailable
from quotas.limits import LimitExceeded, QuotaExceeded, Remaining
from quotas.usage import Counts, UsageStore, import_days
from tests.api.server import eventually

ROOT = Path(__file__).parents[2]
DAY = 20_000
NOON = DAY * 86_400 + 43_200.0
LIFETIME = 360.0


class Clock:
    now = NOON

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(database: Database, clock: Clock) -> UsageStore:
    return UsageStore(database, LIFETIME, clock)


def passes(ask: Callable[[], object]) -> bool:
    try:
        ask()
    except LimitExceeded:
        return False
    return True


def left(store: UsageStore, limit: int) -> int:
    """What a user named ann could still reserve."""
    reservation = store.reserve("ann", 0, limit)
    store.record("ann", "m", Counts(), reservation)
    return reservation.remaining.left


def usage(store: UsageStore, from_day: int, to_day: int) -> dict[tuple[int, str, str], Counts]:
    """The table's rows of these days, both included."""
    store.flush()
    with store._db.reading() as connection:
        rows = connection.execute(text("SELECT * FROM usage ORDER BY day, user_id, model")).all()
    return {(row.day, row.user_id, row.model): Counts(*row[3:]) for row in rows if from_day <= row.day <= to_day}


def test_what_is_reserved_and_not_used_can_be_used_by_the_next(store: UsageStore) -> None:
    reservation = store.reserve("ann", 80, 100)
    assert reservation.remaining == Remaining("Tokens", 100, 20, 43_200)
    with pytest.raises(LimitExceeded) as refused:
        store.reserve("ann", 30, 100)
    assert not isinstance(refused.value, QuotaExceeded)
    assert (refused.value.code, refused.value.retry_after) == ("rate_limited", 1)
    assert "30 tokens, and 20 of today's 100" in refused.value.message
    store.reserve("bob", 100, 100)
    store.record("ann", "m", Counts(1, 8, 0, 2), reservation)
    assert store.tokens_today("ann") == 10
    assert store.reserve("ann", 90, 100).remaining.left == 0


def test_a_quota_that_is_used_up_is_there_again_at_midnight(store: UsageStore, clock: Clock) -> None:
    store.record("ann", "m", Counts(1, 90, 0, 5), store.reserve("ann", 100, 100))
    with pytest.raises(QuotaExceeded) as refused:
        store.reserve("ann", 6, 100)
    assert (refused.value.status, refused.value.code) == (429, "insufficient_quota")
    assert refused.value.retry_after == 43_200 and refused.value.remaining == Remaining("Tokens", 100, 5, 43_200)
    clock.now += 43_199.99
    assert not passes(lambda: store.reserve("ann", 6, 100))
    clock.now += 0.01
    assert store.reserve("ann", 100, 100).remaining == Remaining("Tokens", 100, 0, 86_400)


def test_a_generation_over_midnight_is_paid_by_the_day_it_began(store: UsageStore, clock: Clock) -> None:
    reservation = store.reserve("ann", 50, 100)
    clock.now += 43_200
    assert store.reserve("ann", 100, 100).remaining.left == 0
    store.record("ann", "m", Counts(1, 50), reservation)
    assert store.tokens_today("ann") == 0
    clock.now -= 43_200
    assert store.tokens_today("ann") == 50


def test_what_a_process_that_died_reserved_is_released(store: UsageStore, database: Database, clock: Clock) -> None:
    lost = store.reserve("ann", 100, 100)
    alive = UsageStore(database, LIFETIME, clock)
    clock.now += LIFETIME - 1
    assert left(alive, 100) == 0
    clock.now += 1
    assert left(alive, 100) == 100
    with database.reading() as connection:
        assert connection.execute(text("SELECT count(*) FROM reservations")).scalar() == 0
    store.record("ann", "m", Counts(1, 30), lost)  # it was only stopped for a while
    assert left(alive, 100) == 70


def test_a_free_generation_leaves_nothing_set_aside(store: UsageStore) -> None:
    store.record("ann", "m", Counts(), store.reserve("ann", 60, 100))
    assert left(store, 100) == 100 and usage(store, DAY, DAY) == {}


def test_usage_is_recorded_without_a_quota_and_summed_by_day_user_and_model(store: UsageStore, clock: Clock) -> None:
    for counts in (Counts(1, 10, 4, 3), Counts(1, 20, 0, 7), Counts(1), Counts(1, 5, errors=1)):
        store.record("ann", "m", counts)
    store.record("ann", "other", Counts(1, 1, 0, 1))
    store.record("bob", "m", Counts(1, 2, 0, 2))
    clock.now += 86_400
    store.record("ann", "m", Counts(1, 1))
    assert list(usage(store, DAY, DAY + 1).items()) == [
        ((DAY, "ann", "m"), Counts(4, 35, 4, 10, 1)),
        ((DAY, "ann", "other"), Counts(1, 1, 0, 1)),
        ((DAY, "bob", "m"), Counts(1, 2, 0, 2)),
        ((DAY + 1, "ann", "m"), Counts(1, 1)),
    ]
    assert (store.tokens_today("ann"), store.tokens_today("nobody")) == (1, 0)


def test_tokens_without_a_quota_count_once_there_is_one(store: UsageStore) -> None:
    store.record("ann", "m", Counts(1, 60, 0, 30))
    store.flush()
    assert left(store, 100) == 10


def test_usage_without_a_quota_is_written_within_a_second_and_at_a_clean_stop(
    store: UsageStore, database: Database, clock: Clock
) -> None:
    other = UsageStore(database, LIFETIME, clock)
    store.record("ann", "m", Counts(1, 10))
    assert other.tokens_today("ann") == 0, "a cached answer would pay for a sync"
    eventually(lambda: other.tokens_today("ann") == 10, 5)
    store.record("ann", "m", Counts(1, 10))
    store.close()
    assert other.tokens_today("ann") == 20


def test_nothing_is_lost_while_the_database_does_not_answer(
    store: UsageStore, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def down() -> object:
        raise StoreUnavailable("the database does not answer (SQLITE_BUSY)")
        yield

    reservation = store.reserve("ann", 80, 100)
    with monkeypatch.context() as patched:
        patched.setattr(database, "transaction", down)
        store.record("ann", "m", Counts(1, 30, 0, 10), reservation)
        store.record("ann", "m", Counts(1, 5))
        with pytest.raises(StoreUnavailable):
            store.tokens_today("ann")
        with pytest.raises(StoreUnavailable):
            store.reserve("ann", 1, 100)
    store.flush()
    assert store.tokens_today("ann") == 45 and left(store, 100) == 55


def test_days_of_an_older_version_count(store: UsageStore, database: Database) -> None:
    with database.transaction() as connection:
        import_days(connection, [("ann", DAY - 1, 70), ("ann", DAY, 40), ("bob", DAY, 3)])
        import_days(connection, [])
    assert (store.tokens_today("ann"), left(store, 100)) == (40, 60)
    assert usage(store, DAY - 1, DAY - 1) == {(DAY - 1, "ann", ""): Counts(prompt_tokens=70)}


def test_32_threads_reserve_no_token_too_many(store: UsageStore) -> None:
    start = threading.Barrier(32)

    def work(_: int) -> bool:
        start.wait(10)
        return passes(lambda: store.reserve("ann", 7, 100))

    with ThreadPoolExecutor(32) as pool:
        assert sum(pool.map(work, range(32))) == 14


def test_recording_at_once_loses_and_doubles_nothing(store: UsageStore) -> None:
    reservations = [store.reserve("ann", 10, 160) for _ in range(16)]

    def work(number: int) -> None:
        store.record("ann", "m", Counts(1, 2, 0, 1), reservations[number] if number < 16 else None)

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(work, range(32)))
    assert usage(store, DAY, DAY) == {(DAY, "ann", "m"): Counts(32, 64, 0, 32)}
    assert left(store, 160) == 64


COUNTER = """
import sys
from concurrent.futures import ThreadPoolExecutor
from db import Database
from quotas.usage import Counts, UsageStore
from tests.quotas.test_usage import NOON, passes
store = UsageStore(Database(sys.argv[1]), 360, lambda: NOON)
print("ready", flush=True)
sys.stdin.readline()
def work(number):
    if number % 2:
        store.record("bob", f"m{number % 3}", Counts(1, 1), store.reserve("bob", 9, 9_999))
    return passes(lambda: store.reserve("ann", 7, 100))
with ThreadPoolExecutor(16) as pool:
    print(sum(pool.map(work, range(64))))
"""


def test_two_processes_share_one_quota(store: UsageStore, database: Database) -> None:
    url = database._writer.url.render_as_string(hide_password=False)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    both = [subprocess.Popen([sys.executable, "-c", COUNTER, url], **pipes) for _ in range(2)]
    assert [process.stdout.readline() for process in both] == ["ready\n"] * 2
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert sum(int(process.communicate(timeout=60)[0]) for process in both) == 14
    assert store.tokens_today("bob") == 64


def test_the_tables_are_those_that_the_code_declares(database: Database) -> None:
    from sqlalchemy import inspect

    from db import metadata

    with database.reading() as connection:
        found = inspect(connection)
        for name in ("usage", "reservations"):
            declared = {column.name: column.nullable for column in metadata.tables[name].columns}
            assert {column["name"]: column["nullable"] for column in found.get_columns(name)} == declared
            keys = [column.name for column in metadata.tables[name].primary_key]
            assert found.get_pk_constraint(name)["constrained_columns"] == keys
