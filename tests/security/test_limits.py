"""Limits, on a clock that the test turns."""

from __future__ import annotations

import select
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from security.limits import LimitExceeded, LoginGuard, RequestRate, StreamLimit


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


class Polite(Clock):
    """A clock that lets another thread run whenever it is read, or a missing lock would rarely show."""

    def __call__(self) -> float:
        select.select((), (), (), 0)  # waits for nothing, but without the interpreter's lock
        return self.now


def at_once(ask: Callable[[], object]) -> int:
    """How many of 32 threads that begin together pass."""
    start = threading.Barrier(32)

    def work(_: int) -> bool:
        start.wait(10)
        return passes(ask)

    with ThreadPoolExecutor(32) as pool:
        return sum(pool.map(work, range(32)))


def passes(ask: Callable[[], object]) -> bool:
    try:
        ask()
    except LimitExceeded:
        return False
    return True


def test_requests_over_the_rate_wait_as_long_as_told(clock: Clock) -> None:
    rate = RequestRate(3, clock)
    for _ in range(3):
        rate.hit("ann")
        clock.now += 10
    with pytest.raises(LimitExceeded) as refused:
        rate.hit("ann")
    assert refused.value.retry_after == pytest.approx(30)
    clock.now += refused.value.retry_after - 0.01
    assert not passes(lambda: rate.hit("ann"))
    clock.now += 0.01
    assert passes(lambda: rate.hit("ann"))


def test_a_refused_request_is_not_counted(clock: Clock) -> None:
    rate = RequestRate(1, clock)
    rate.hit("ann")
    assert not any(passes(lambda: rate.hit("ann")) for _ in range(100))
    clock.now += 60
    rate.hit("ann")


def test_users_have_rates_of_their_own(clock: Clock) -> None:
    rate = RequestRate(1, clock)
    rate.hit("ann")
    rate.hit("bob")
    assert not passes(lambda: rate.hit("ann"))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 40), max_size=60), st.integers(1, 6))
def test_no_window_of_a_minute_ever_holds_more_than_the_rate(pauses: list[float], most: int) -> None:
    clock, taken = Clock(), []
    rate = RequestRate(most, clock)
    for pause in pauses:
        clock.now += pause
        if passes(lambda: rate.hit("ann")):
            taken.append(clock.now)
        else:
            assert len([at for at in taken if at > clock.now - 60]) == most, "refused without need"
    assert all(later - earlier >= 60 for earlier, later in zip(taken, taken[most:], strict=False))


def test_a_rate_is_exact_under_32_threads() -> None:
    rate = RequestRate(20, Polite())
    assert [at_once(lambda name=name: rate.hit(name)) for name in "abcdefgh"] == [20] * 8


def test_rates_start_no_threads_and_forget_the_stalest(clock: Clock) -> None:
    rate = RequestRate(1, clock, most_users=3)
    for name in "abcd":
        rate.hit(name)
    assert not passes(lambda: rate.hit("d")) and not passes(lambda: rate.hit("b"))
    assert passes(lambda: rate.hit("a")), "the stalest of four was not forgotten"


def test_the_sixth_wrong_password_is_refused(clock: Clock) -> None:
    logins = LoginGuard(clock=clock)
    for _ in range(5):
        logins.attempt("198.51.100.1", "ann")
        clock.now += 1
    with pytest.raises(LimitExceeded) as refused:
        logins.attempt("198.51.100.1", "ann")
    assert refused.value.retry_after == pytest.approx(895)
    clock.now += 895
    logins.attempt("198.51.100.1", "ann")


def test_another_address_or_name_is_not_locked_out(clock: Clock) -> None:
    logins = LoginGuard(attempts=1, clock=clock)
    logins.attempt("198.51.100.1", "ann")
    assert not passes(lambda: logins.attempt("198.51.100.1", "ann"))
    logins.attempt("198.51.100.2", "ann")
    logins.attempt("198.51.100.1", "bob")
    logins.attempt("198.51.100.1a", "nn")


def test_a_right_password_forgives_the_wrong_ones(clock: Clock) -> None:
    logins = LoginGuard(attempts=2, clock=clock)
    for _ in range(5):
        logins.attempt("198.51.100.1", "ann")
        logins.attempt("198.51.100.1", "ann")
        logins.succeeded("198.51.100.1", "ann")


def test_guesses_sent_at_once_are_counted_before_any_is_answered() -> None:
    logins = LoginGuard(clock=Polite())
    assert at_once(lambda: logins.attempt("::1", "ann")) == 5


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
    logins = LoginGuard(attempts=1, clock=clock)
    logins.attempt(one, "ann")
    assert passes(lambda: logins.attempt(two, "ann")) != same


@pytest.mark.parametrize("name", ["\ud800", "\x00", "x" * 100_000, "a/b"])
def test_any_text_can_be_tried_as_a_name(clock: Clock, name: str) -> None:
    logins = LoginGuard(attempts=1, clock=clock)
    logins.attempt("198.51.100.1", name)
    assert not passes(lambda: logins.attempt("198.51.100.1", name))


def test_one_stream_too_many_is_refused_until_one_ends() -> None:
    streams = StreamLimit(2)
    first, _ = streams.take("ann"), streams.take("ann")
    with pytest.raises(LimitExceeded) as refused:
        streams.take("ann")
    assert refused.value.retry_after > 0
    streams.take("bob")
    first()
    first()  # giving back twice frees one place, not two
    streams.take("ann")
    assert not passes(lambda: streams.take("ann"))


def test_streams_are_counted_exactly_under_32_threads() -> None:
    streams, start = StreamLimit(10), threading.Barrier(32)
    most, open_now, counting = [0], [0], threading.Lock()

    def work(_: int) -> None:
        start.wait(10)
        for _ in range(50):
            try:
                give_back = streams.take("ann")
            except LimitExceeded:
                continue
            with counting:
                open_now[0] += 1
                most[0] = max(most[0], open_now[0])
            with counting:
                open_now[0] -= 1
            give_back()

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(work, range(32)))
    assert 1 <= most[0] <= 10
    assert at_once(lambda: streams.take("bob")) == 10
    kept = [streams.take("ann") for _ in range(10)]  # nothing leaked: all ten places are there again
    assert not passes(lambda: streams.take("ann"))
    for give_back in kept:
        give_back()
    assert set(streams._open) == {"bob"}, "a user without streams is still remembered"
