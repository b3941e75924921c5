"""The limits' words and waits, over counts in memory, on a clock that the test turns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from olddb import Database
from quotas.counts import MemoryLeases, MemoryWindows, SqliteQuotas
from quotas.limits import (
    LimitExceeded,
    LoginGuard,
    QuotaExceeded,
    RequestRate,
    Room,
    StreamLimit,
    TokenQuota,
)

NOON = 20_000 * 86_400 + 43_200.0


class Clock:
    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def rate(clock: Clock) -> RequestRate:
    return RequestRate(MemoryWindows(clock))


@pytest.fixture
def quota(clock: Clock, tmp_path: Path) -> TokenQuota:
    return TokenQuota(SqliteQuotas(Database(tmp_path / "state.db")), clock)


def logins(clock: Clock, attempts: int) -> LoginGuard:
    return LoginGuard(MemoryWindows(clock), attempts)


def passes(ask: Callable[[], object]) -> bool:
    try:
        ask()
    except LimitExceeded:
        return False
    return True


def test_requests_over_the_rate_wait_as_long_as_told(clock: Clock, rate: RequestRate) -> None:
    for left in (2, 1, 0):
        assert rate.hit("ann", 3) == Room(3, left, 60 - 10 * (2 - left))
        clock.now += 10
    with pytest.raises(LimitExceeded) as refused:
        rate.hit("ann", 3)
    assert refused.value.retry_after == 30 and refused.value.room == Room(3, 0, 30)
    clock.now += refused.value.retry_after - 0.01
    assert not passes(lambda: rate.hit("ann", 3))
    clock.now += 0.01
    assert passes(lambda: rate.hit("ann", 3))


def test_a_refused_request_is_not_counted(clock: Clock, rate: RequestRate) -> None:
    rate.hit("ann", 1)
    assert not any(passes(lambda: rate.hit("ann", 1)) for _ in range(100))
    clock.now += 60
    rate.hit("ann", 1)


def test_users_have_rates_of_their_own(rate: RequestRate) -> None:
    rate.hit("ann", 1)
    rate.hit("bob", 1)
    assert not passes(lambda: rate.hit("ann", 1))


def test_a_lowered_rate_counts_what_was_let_through_before(clock: Clock, rate: RequestRate) -> None:
    for _ in range(5):
        rate.hit("ann", 5)
        clock.now += 1
    with pytest.raises(LimitExceeded) as refused:
        rate.hit("ann", 2)
    assert refused.value.retry_after == 58, "the fourth of five has to be a minute old first"
    clock.now += refused.value.retry_after
    rate.hit("ann", 2)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 40), max_size=60), st.integers(1, 6))
def test_no_window_of_a_minute_ever_holds_more_than_the_rate(pauses: list[float], most: int) -> None:
    clock, taken = Clock(), []
    rate = RequestRate(MemoryWindows(clock))
    for pause in pauses:
        clock.now += pause
        if passes(lambda: rate.hit("ann", most)):
            taken.append(clock.now)
        else:
            assert len([at for at in taken if at > clock.now - 60]) == most, "refused without need"
    assert all(later - earlier >= 60 for earlier, later in zip(taken, taken[most:], strict=False))


@pytest.mark.promise("P22", injected="six tries in a row", counted="the sixth refused until the first is old")
def test_the_sixth_wrong_password_is_refused(clock: Clock) -> None:
    guard = LoginGuard(MemoryWindows(clock))
    for _ in range(5):
        guard.attempt("198.51.100.1", "ann")
        clock.now += 1
    with pytest.raises(LimitExceeded) as refused:
        guard.attempt("198.51.100.1", "ann")
    assert refused.value.retry_after == pytest.approx(895)
    clock.now += 895
    guard.attempt("198.51.100.1", "ann")


def test_another_address_or_name_is_not_locked_out(clock: Clock) -> None:
    guard = logins(clock, 1)
    guard.attempt("198.51.100.1", "ann")
    assert not passes(lambda: guard.attempt("198.51.100.1", "ann"))
    guard.attempt("198.51.100.2", "ann")
    guard.attempt("198.51.100.1", "bob")
    guard.attempt("198.51.100.1a", "nn")


def test_a_right_password_forgives_the_wrong_ones(clock: Clock) -> None:
    guard = logins(clock, 2)
    for _ in range(5):
        guard.attempt("198.51.100.1", "ann")
        guard.attempt("198.51.100.1", "ann")
        guard.succeeded("198.51.100.1", "ann")


@pytest.mark.parametrize(
    ("one", "two", "same"),
    [
        ("2001:db8::1", "2001:db8::ffff:2", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:198.51.100.1", "198.51.100.1", True),
        ("fe80::1%eth0", "fe80::2%eth1", True),
        ("not an address", "nor this", False),
    ],
)
def test_an_ipv6_household_is_one_guesser(clock: Clock, one: str, two: str, same: bool) -> None:
    guard = logins(clock, 1)
    guard.attempt(one, "ann")
    assert passes(lambda: guard.attempt(two, "ann")) != same


@pytest.mark.parametrize("name", ["\ud800", "\x00", "x" * 100_000, "a/b"])
def test_any_text_can_be_tried_as_a_name(clock: Clock, name: str) -> None:
    guard = logins(clock, 1)
    guard.attempt("198.51.100.1", name)
    assert not passes(lambda: guard.attempt("198.51.100.1", name))


def test_one_stream_too_many_is_refused_until_one_ends() -> None:
    streams = StreamLimit(MemoryLeases())
    first, _ = streams.take("ann", 2), streams.take("ann", 2)
    with pytest.raises(LimitExceeded) as refused:
        streams.take("ann", 2)
    assert refused.value.retry_after > 0
    streams.take("bob", 2)
    first.give_back()
    first.give_back()  # giving back twice frees one place, not two
    streams.take("ann", 2)
    assert not passes(lambda: streams.take("ann", 2))


def test_what_is_reserved_and_not_used_can_be_used_by_the_next(quota: TokenQuota) -> None:
    bill = quota.reserve("ann", 80, 100)
    assert bill.room == Room(100, 20, 43_200)
    with pytest.raises(LimitExceeded) as refused:
        quota.reserve("ann", 30, 100)
    assert not isinstance(refused.value, QuotaExceeded) and refused.value.retry_after == 1
    assert "30 tokens, and 20 of today's 100" in str(refused.value)
    bill.settle(10)
    bill.settle(90)  # the first word counts
    assert quota.spent("ann") == 10
    assert quota.reserve("ann", 90, 100).room.left == 0


def test_a_quota_that_is_used_up_is_there_again_at_midnight(clock: Clock, quota: TokenQuota) -> None:
    quota.reserve("ann", 100, 100).settle(95)
    with pytest.raises(QuotaExceeded) as refused:
        quota.reserve("ann", 6, 100)
    assert refused.value.retry_after == 43_200 and refused.value.room == Room(100, 5, 43_200)
    clock.now += refused.value.retry_after - 0.01
    assert not passes(lambda: quota.reserve("ann", 6, 100))
    clock.now += 0.01
    assert quota.reserve("ann", 100, 100).room == Room(100, 0, 86_400)


def test_a_generation_over_midnight_is_paid_by_the_day_it_began(clock: Clock, quota: TokenQuota) -> None:
    bill = quota.reserve("ann", 50, 100)
    clock.now += 43_200
    assert quota.reserve("ann", 100, 100).room.left == 0
    bill.settle(50)
    assert quota.spent("ann") == 0
    clock.now -= 43_200
    assert quota.spent("ann") == 50
