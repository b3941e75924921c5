"""Counts: the same promises in one process and in a Redis that processes share."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
import redis

from cache.breaker import Breaker
from errors import StoreUnavailable
from olddb import Database
from quotas.counts import MemoryLeases, MemoryWindows, SqliteQuotas
from quotas.shared_counts import SharedCounts
from tests.api.server import eventually
from tests.faults import FaultProxy

ROOT = Path(__file__).parents[2]
TODAY = 20_000


@pytest.fixture(params=["local", "redis"])
def counts(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "redis":
        return SharedCounts(request.getfixturevalue("redis_url"))
    rooms = MemoryWindows(), MemoryLeases(), SqliteQuotas(Database(tmp_path / "state.db"))
    names = ("hit", "forget"), ("take", "keep", "give_back"), ("reserve", "settle", "spent")
    return SimpleNamespace(
        **{name: getattr(room, name) for room, own in zip(rooms, names, strict=True) for name in own}
    )


@pytest.fixture
def name() -> str:
    """Never used before: the Redis lives through all tests."""
    return uuid4().hex


def at_once(ask: Callable[[], bool]) -> int:
    """How many of 32 threads that begin together are told yes."""
    start = threading.Barrier(32)

    def work(_: int) -> bool:
        start.wait(10)
        return ask()

    with ThreadPoolExecutor(32) as pool:
        return sum(pool.map(work, range(32)))


def test_a_window_counts_to_its_limit_and_says_when_there_is_room(counts: Any, name: str) -> None:
    for left in (2, 1, 0):
        counted, room, reset = counts.hit(name, 3, 60)
        assert (counted, room) == (True, left) and 55 < reset <= 60
    counted, room, reset = counts.hit(name, 3, 60)
    assert (counted, room) == (False, 0) and 55 < reset <= 60
    assert counts.hit(name + "2", 3, 60)[0]
    counts.forget(name)
    assert counts.hit(name, 3, 60)[:2] == (True, 2)


def test_a_window_moves(counts: Any, name: str) -> None:
    assert [counts.hit(name, 2, 0.3)[0] for _ in range(3)] == [True, True, False]
    eventually(lambda: counts.hit(name, 2, 0.3)[0], 5)


def test_a_window_that_got_narrower_waits_for_the_hit_that_makes_room(counts: Any, name: str) -> None:
    for _ in range(3):
        counts.hit(name, 3, 60)
    counted, room, reset = counts.hit(name, 1, 60)
    assert (counted, room) == (False, 0) and 55 < reset <= 60


def test_a_lease_is_held_until_it_is_given_back(counts: Any, name: str) -> None:
    assert [counts.take(name, lease, 2) for lease in "abc"] == [True, True, False]
    counts.keep(name, "a")
    counts.give_back(name, "a")
    counts.give_back(name, "a")
    assert [counts.take(name, lease, 2) for lease in "cd"] == [True, False]


def test_tokens_are_reserved_and_settled_once(counts: Any, name: str) -> None:
    assert counts.reserve(name, TODAY, f"{name}1", 60, 100) == (True, 0, 60)
    assert counts.reserve(name, TODAY, f"{name}2", 50, 100) == (False, 0, 60)
    for used in (30, 99):
        counts.settle(name, TODAY, f"{name}1", used)
    assert counts.reserve(name, TODAY, f"{name}2", 70, 100) == (True, 30, 70)
    assert (counts.spent(name, TODAY), counts.spent(name, TODAY + 1)) == (30, 0)
    assert counts.reserve(name, TODAY + 1, f"{name}3", 100, 100) == (True, 0, 100)


def test_all_are_exact_under_32_threads(counts: Any, name: str) -> None:
    assert at_once(lambda: counts.hit(name, 20, 60)[0]) == 20
    assert at_once(lambda: counts.take(name, uuid4().hex, 10)) == 10
    assert at_once(lambda: counts.reserve(name, TODAY, uuid4().hex, 7, 100)[0]) == 14


def test_settling_at_once_loses_and_doubles_nothing(counts: Any, name: str) -> None:
    bills = [uuid4().hex for _ in range(16)]
    for bill in bills:
        assert counts.reserve(name, TODAY, bill, 10, 160)[0]
    with ThreadPoolExecutor(32) as pool:
        list(pool.map(lambda bill: counts.settle(name, TODAY, bill, 3), bills * 2))
    assert counts.reserve(name, TODAY, uuid4().hex, 112, 160) == (True, 48, 112)


COUNTER = """
import sys, uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from quotas.counts import SqliteQuotas
from olddb import Database
from quotas.shared_counts import SharedCounts
where, name, what = sys.argv[1:]
counts = SqliteQuotas(Database(Path(where))) if where.startswith("/") else SharedCounts(where)
print("ready", flush=True)
sys.stdin.readline()
asks = {
    "rate": lambda _: counts.hit(name, 20, 60)[0],
    "streams": lambda _: counts.take(name, uuid.uuid4().hex, 10),
    "tokens": lambda _: counts.reserve(name, 20_000, uuid.uuid4().hex, 7, 100)[0],
}
with ThreadPoolExecutor(16) as pool:
    print(sum(pool.map(asks[what], range(64))))
"""


@pytest.mark.parametrize(
    ("store", "what", "most"),
    [("redis", "rate", 20), ("redis", "streams", 10), ("redis", "tokens", 14), ("sqlite", "tokens", 14)],
)
def test_two_processes_share_one_count(
    redis_url: str, tmp_path: Path, name: str, store: str, what: str, most: int
) -> None:
    where = redis_url if store == "redis" else str(tmp_path / "state.db")
    command = [sys.executable, "-c", COUNTER, where, name, what]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    both = [subprocess.Popen(command, **pipes) for _ in range(2)]
    assert [process.stdout.readline() for process in both] == ["ready\n"] * 2
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert sum(int(process.communicate(timeout=30)[0]) for process in both) == most


def test_windows_forget_the_stalest_name(name: str) -> None:
    windows = MemoryWindows(most_names=3)
    for one in "abcd":
        windows.hit(one, 1, 60)
    assert not windows.hit("d", 1, 60)[0] and not windows.hit("b", 1, 60)[0]
    assert windows.hit("a", 1, 60)[0], "the stalest of four was not forgotten"


def test_a_killed_process_costs_its_leases_a_while_and_its_bills_the_day(
    redis_url: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quotas.shared_counts._LEASE", 0.3)
    dead, alive = SharedCounts(redis_url), SharedCounts(redis_url)
    assert dead.take(name, "lost", 1) and dead.reserve(name, TODAY, "lost", 60, 100)[0]
    assert not alive.take(name, "a", 1)
    eventually(lambda: alive.take(name, "a", 1), 5)
    assert alive.reserve(name, TODAY, "b", 50, 100) == (False, 0, 60)


def test_a_lease_that_is_kept_up_outlives_its_time(redis_url: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quotas.shared_counts._LEASE", 0.3)
    counts = SharedCounts(redis_url)
    counts.take(name, "a", 1)
    counts.take(name + "2", "a", 1)

    def other_has_ended() -> bool:
        counts.keep(name, "a")
        return counts.take(name + "2", "b", 1)

    eventually(other_has_ended, 5)
    assert not counts.take(name, "b", 1)


def test_nothing_in_redis_is_kept_for_ever(redis_url: str, name: str) -> None:
    counts = SharedCounts(redis_url)
    counts.hit(f"rate:{name}", 3, 60)
    counts.take(name, "a", 3)
    counts.reserve(name, TODAY, "b", 1, 3)
    counts.settle(name, TODAY, "b", 1)
    keys = redis.Redis.from_url(redis_url)
    found = list(keys.scan_iter(f"*{name}*"))
    assert len(found) == 3 and all(0 < keys.ttl(key) <= 172_800 for key in found)
    keys.close()


@pytest.fixture
def proxy(redis_url: str) -> Iterator[FaultProxy]:
    there = urlsplit(redis_url)
    with FaultProxy((there.hostname or "", there.port or 0)) as running:
        yield running


@pytest.mark.parametrize("mode", ["refuse", "black hole", "garbage"])
def test_without_its_redis_nobody_is_let_in_and_giving_back_does_not_raise(
    proxy: FaultProxy, name: str, mode: Any
) -> None:
    counts = SharedCounts(f"redis://127.0.0.1:{proxy.port}/0", Breaker(faults=100), timeout=0.1)
    assert counts.take(name, "a", 1) and counts.reserve(name, TODAY, "b", 60, 100)[0]
    proxy.mode = mode
    for ask in (
        lambda: counts.hit(name, 1, 60),
        lambda: counts.take(name, "c", 9),
        lambda: counts.reserve(name, TODAY, "d", 1, 100),
        lambda: counts.spent(name, TODAY),
    ):
        with pytest.raises(StoreUnavailable):
            ask()
    counts.keep(name, "a")
    counts.give_back(name, "a")
    counts.settle(name, TODAY, "b", 1)
    counts.forget(name)
    assert proxy.injected >= 8


def test_a_step_whose_answer_got_lost_can_be_sent_again(
    redis_url: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = SharedCounts(redis_url)
    monkeypatch.setattr("quotas.shared_counts.token_hex", lambda _: "the same")
    assert [counts.hit(name, 2, 60)[:2] for _ in range(3)] == [(True, 1)] * 3
    assert [counts.take(name, "a", 1) for _ in range(3)] == [True] * 3
    assert [counts.reserve(name, TODAY, "b", 60, 100) for _ in range(3)] == [(True, 0, 60)] * 3


def test_a_flapping_redis_loses_and_doubles_nothing(proxy: FaultProxy, name: str) -> None:
    """Every second request is reset, and sent again by redis-py."""
    counts = SharedCounts(f"redis://127.0.0.1:{proxy.port}/0", Breaker(faults=100))
    counts.reserve(name, TODAY, "warm", 0, 100)
    proxy.mode = "flap"
    for bill in "abcd":
        assert counts.reserve(name, TODAY, bill, 10, 100)[0]
        counts.settle(name, TODAY, bill, 4)
    assert proxy.injected >= 4
    proxy.mode = "pass"
    assert counts.reserve(name, TODAY, "e", 10, 100) == (True, 16, 10)
