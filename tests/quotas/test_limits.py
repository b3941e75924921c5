"""Whose limit counts, requests a minute and open streams; on a clock that the test turns, and in a real Redis."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from accounts.roles import Role
from cache.redis_cache import Breaker, RedisLink
from quotas.limits import ConcurrencyLimit, LimitExceeded, Limits, LimitTable, RequestRate
from settings import Settings, SettingsError
from tests.faults import FaultProxy, Mode

ROOT = Path(__file__).parents[2]
DEFAULT = Limits(10, 120, 0)
RULES = ("admin.rpm=600", "admin.streams=20", "user.tokens_per_day=5000", "user.tokens_per_day=7000")
OWN = {"streams": None, "rpm": None, "tokens_per_day": None}


class Clock:
    now = 43_200.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["memory", "redis"])
def rate(request: pytest.FixtureRequest) -> RequestRate:
    return RequestRate() if request.param == "memory" else shared(request.getfixturevalue("redis_url"))


@pytest.fixture
def name() -> str:
    """Never used before: the Redis lives through all tests."""
    return uuid4().hex


LINKS: list[RedisLink] = []


def shared(url: str, breaker: Breaker | None = None, timeout: float = 10) -> RequestRate:
    """Patient, since what a busy machine answers late is counted in the process instead."""
    link = RedisLink(url, breaker, timeout)
    LINKS.append(link)
    return RequestRate((link.redis, link.ask))


@pytest.fixture(autouse=True)
def links_are_closed() -> Iterator[None]:
    yield
    while LINKS:
        LINKS.pop().close()


def passes(ask: Callable[[], object]) -> bool:
    try:
        ask()
    except LimitExceeded:
        return False
    return True


@pytest.mark.parametrize(
    ("role", "own", "expected"),
    [
        (Role.AUDITOR, OWN, DEFAULT),
        (Role.ADMIN, OWN, Limits(20, 600, 0)),
        (Role.USER, OWN, Limits(10, 120, 7000)),
        (Role.USER, {**OWN, "streams": 1, "tokens_per_day": 0}, Limits(1, 120, 0)),
        (Role.ADMIN, {"streams": 1, "rpm": 2, "tokens_per_day": 3}, Limits(1, 2, 3)),
        ("no such role", OWN, DEFAULT),
    ],
)
def test_the_nearest_limit_counts(role: str, own: dict[str, int | None], expected: Limits) -> None:
    assert LimitTable(DEFAULT, RULES).of(role, **own) == expected


def test_roles_are_limited_by_one_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROLE_LIMITS", ", ".join(f"{role}.rpm=1" for role in Role))
    rules = Settings.from_environment().role_limits
    assert {LimitTable(DEFAULT, rules).of(role, **OWN).rpm for role in Role} == {1}


@pytest.mark.parametrize("wrong", ["admin", "root.rpm=1", "admin.rpm=0", "admin.rpm=-1", "admin.tpm=1", "admin.rpm=1;"])
def test_a_wrong_rule_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    monkeypatch.setenv("ROLE_LIMITS", f"user.rpm=1,{wrong}")
    with pytest.raises(SettingsError, match=r"^ROLE_LIMITS: .*for example ROLE_LIMITS=admin\.rpm=600"):
        Settings.from_environment()


class TestAnyRequestRate:
    """Holds in memory and in Redis."""

    def test_it_counts_to_its_limit_and_says_when_there_is_room(self, rate: RequestRate, name: str) -> None:
        for left in (2, 1, 0):
            remaining = rate.hit(name, 3)
            assert (remaining.limit, remaining.left) == (3, left) and 55 < remaining.reset <= 60
        with pytest.raises(LimitExceeded) as refused:
            rate.hit(name, 3)
        assert (refused.value.status, refused.value.code) == (429, "rate_limited")
        assert refused.value.remaining is not None and refused.value.remaining.left == 0
        assert 55 < refused.value.retry_after == refused.value.remaining.reset <= 60  # type: ignore[operator]
        assert passes(lambda: rate.hit(f"{name}2", 3)), "one name's hits were counted for another"

    def test_it_is_exact_under_32_threads(self, rate: RequestRate, name: str) -> None:
        start = threading.Barrier(32)

        def work(_: int) -> bool:
            start.wait(10)
            return passes(lambda: rate.hit(name, 20))

        with ThreadPoolExecutor(32) as pool:
            assert sum(pool.map(work, range(32))) == 20


def test_requests_over_the_rate_wait_as_long_as_told(clock: Clock) -> None:
    rate = RequestRate(clock=clock)
    for left in (2, 1, 0):
        remaining = rate.hit("ann", 3)
        assert (remaining.left, remaining.reset) == (left, 60 - 10 * (2 - left))
        clock.now += 10
    with pytest.raises(LimitExceeded) as refused:
        rate.hit("ann", 3)
    assert refused.value.retry_after == 30
    clock.now += 29.99
    assert not passes(lambda: rate.hit("ann", 3))
    clock.now += 0.01
    assert passes(lambda: rate.hit("ann", 3))


def test_a_refused_request_is_not_counted(clock: Clock) -> None:
    rate = RequestRate(clock=clock)
    rate.hit("ann", 1)
    assert not any(passes(lambda: rate.hit("ann", 1)) for _ in range(100))
    clock.now += 60
    rate.hit("ann", 1)


def test_a_lowered_rate_counts_what_was_let_through_before(clock: Clock) -> None:
    rate = RequestRate(clock=clock)
    for _ in range(5):
        rate.hit("ann", 5)
        clock.now += 1
    with pytest.raises(LimitExceeded) as refused:
        rate.hit("ann", 2)
    assert refused.value.retry_after == 58, "the fourth of five has to be a minute old first"
    clock.now += 58
    rate.hit("ann", 2)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 40), max_size=60), st.integers(1, 6))
def test_no_window_of_a_minute_ever_holds_more_than_the_rate(pauses: list[float], limit: int) -> None:
    clock, taken = Clock(), []
    rate = RequestRate(clock=clock)
    for pause in pauses:
        clock.now += pause
        if passes(lambda: rate.hit("ann", limit)):
            taken.append(clock.now)
        else:
            assert len([at for at in taken if at > clock.now - 60]) == limit, "refused without need"
    assert all(later - earlier >= 60 for earlier, later in zip(taken, taken[limit:], strict=False))


COUNTER = """
import sys
from concurrent.futures import ThreadPoolExecutor
from tests.quotas.test_limits import passes, shared
url, name = sys.argv[1:]
rate = shared(url)
print("ready", flush=True)
sys.stdin.readline()
with ThreadPoolExecutor(16) as pool:
    print(sum(pool.map(lambda _: passes(lambda: rate.hit(name, 20)), range(64))))
"""


def test_two_processes_share_one_count_in_redis(redis_url: str, name: str) -> None:
    command = [sys.executable, "-c", COUNTER, redis_url, name]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    both = [subprocess.Popen(command, **pipes) for _ in range(2)]
    assert [process.stdout.readline() for process in both] == ["ready\n"] * 2
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert sum(int(process.communicate(timeout=30)[0]) for process in both) == 20


def test_nothing_in_redis_is_kept_for_ever(redis_url: str, name: str) -> None:
    shared(redis_url).hit(name, 3)
    with redis.Redis.from_url(redis_url) as client:
        (key,) = client.scan_iter(f"*{name}*")
        assert 0 < client.ttl(key) <= 60


@pytest.fixture
def proxy(redis_url: str) -> Iterator[FaultProxy]:
    there = urlsplit(redis_url)
    with FaultProxy((there.hostname or "", there.port or 0)) as running:
        yield running


@pytest.mark.promise("P17", injected="a Redis that refuses, hangs or answers garbage")
@pytest.mark.parametrize("mode", ["refuse", "black hole", "slow", "garbage"])
def test_without_redis_rates_hold_in_the_process(
    proxy: FaultProxy, name: str, mode: Mode, counted: Callable[..., None]
) -> None:
    rate = shared(f"redis://127.0.0.1:{proxy.port}/0", Breaker(faults=2), timeout=0.1)
    rate.hit(name, 3)
    proxy.mode = mode
    passed = [passes(lambda: rate.hit(name, 3)) for _ in range(5)]
    counted(faults=proxy.injected, requests_served=passed.count(True), requests_limited=passed.count(False))
    assert passed == [True, True, True, False, False] and proxy.injected >= 2


def test_one_stream_too_many_is_refused_until_one_ends() -> None:
    streams = ConcurrencyLimit()
    with ExitStack() as held:
        first = held.enter_context(ExitStack())
        first.enter_context(streams.hold("ann", 2))
        held.enter_context(streams.hold("ann", 2))
        with pytest.raises(LimitExceeded) as refused, streams.hold("ann", 2):
            pass
        assert refused.value.retry_after == 1 and passes(lambda: held.enter_context(streams.hold("bob", 2)))
        first.close()
        first.close()  # closing twice frees one stream, not two
        held.enter_context(streams.hold("ann", 2))
        assert not passes(lambda: held.enter_context(streams.hold("ann", 2)))
    assert not streams._open, "a name that holds nothing is kept"


def test_streams_are_exact_under_32_threads() -> None:
    streams, start = ConcurrencyLimit(), threading.Barrier(32)
    with ExitStack() as held, ThreadPoolExecutor(32) as pool:

        def work(_: int) -> bool:
            start.wait(10)
            return passes(lambda: held.enter_context(streams.hold("ann", 10)))

        assert sum(pool.map(work, range(32))) == 10


@pytest.mark.parametrize(
    "answer", [[1, 1 << 62, 1 << 62], [1, -9, -9], [1, b"x", 1], [1, 1, b"x"], [1, 1], [], 1, None, b"x"]
)
def test_what_redis_answers_is_kept_in_bounds(
    redis_url: str, name: str, monkeypatch: pytest.MonkeyPatch, answer: object
) -> None:
    """Redis is not trusted: Retry-After must stay a number that a client can wait for."""
    rate = shared(redis_url)
    monkeypatch.setattr(rate, "_hit", lambda *_: answer)
    remaining = rate.hit(name, 3)
    assert 0 <= remaining.left <= 3 and 0 < remaining.reset <= 60
