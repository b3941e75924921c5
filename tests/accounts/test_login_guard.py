"""How many wrong passwords one address may try for one name, on a clock that the test turns."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from accounts.login_guard import LoginGuard
from errors import RateLimited


class Clock:
    now = 43_200.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def logins(clock: Clock, attempts: int = 5) -> LoginGuard:
    return LoginGuard(attempts, clock=clock)


def passes(ask: Callable[[], object]) -> bool:
    try:
        ask()
    except RateLimited:
        return False
    return True


@pytest.mark.promise("P22", injected="six tries in a row", counted="the sixth refused until the first is old")
def test_the_sixth_wrong_password_is_refused(clock: Clock) -> None:
    guard = logins(clock)
    for _ in range(5):
        guard.attempt("198.51.100.1", "ann")
        clock.now += 1
    with pytest.raises(RateLimited) as refused:
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
