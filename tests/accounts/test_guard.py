"""Guessing at passwords: what is counted, who is let through, in memory and in Redis."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import redis

from accounts import guard as module
from accounts.guard import LoginGuard, TooManyFailures
from cache.redis_cache import RedisLink
from errors import Overloaded, Unauthorized
from tests.faults import FaultProxy

ANN = ("198.51.100.1", "ann")
Try = Callable[..., bool]


class Clock:
    now = 1_800_000_000.0

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("limits.storage.memory.time", clock)
    monkeypatch.setattr(module, "time", SimpleNamespace(time=clock.time, monotonic=clock.time))
    return clock


@pytest.fixture(params=["memory", "redis"])
def guard(request: pytest.FixtureRequest) -> LoginGuard:
    if request.param == "redis":
        url = request.getfixturevalue("redis_url")
        with redis.Redis.from_url(url) as client:
            client.flushall()
        return sharing(url)
    return LoginGuard(b"key", 16)


def sharing(url: str) -> LoginGuard:
    link = RedisLink(url)
    return LoginGuard(b"key", 16, (link.redis, link.ask))


def wrong(guard: LoginGuard, address: str, name: str, **cookies: str) -> bool:
    """Whether a wrong password was looked at."""
    try:
        with guard.attempt(address, name, cookies):
            raise Unauthorized("wrong")
    except TooManyFailures:
        return False
    except Unauthorized:
        return True


def right(guard: LoginGuard, address: str, name: str, **cookies: str) -> bool:
    """Whether a right password gets in."""
    try:
        with guard.attempt(address, name, cookies):
            return True
    except TooManyFailures:
        return False


@pytest.mark.promise("P22", injected="six wrong passwords, then the right one")
def test_the_sixth_attempt_is_refused_and_another_address_or_name_is_not(
    guard: LoginGuard, counted: Callable[..., None]
) -> None:
    checked, let_in = [wrong(guard, *ANN) for _ in range(6)], right(guard, *ANN)
    others = [right(guard, *other) for other in (("198.51.100.2", "ann"), (ANN[0], "bob"), ("198.51.100.1a", "nn"))]
    counted(
        wrong_passwords=len(checked), checked=sum(checked), let_in_afterwards=int(let_in), others_let_in=sum(others)
    )
    assert checked == [True] * 5 + [False] and not let_in and others == [True] * 3


def test_right_passwords_are_not_counted_and_forgive_the_wrong_ones(guard: LoginGuard) -> None:
    assert all(right(guard, *ANN) for _ in range(20))
    for _ in range(3):
        assert all(wrong(guard, *ANN) for _ in range(4)) and right(guard, *ANN)


@pytest.mark.promise("P22", injected="fifty guesses at the same moment")
def test_fifty_guesses_at_once_are_five(guard: LoginGuard, counted: Callable[..., None]) -> None:
    def guess(_: int) -> bool:
        while True:
            try:
                return wrong(guard, *ANN)
            except Overloaded:  # half of the places are for other addresses
                continue

    with ThreadPoolExecutor(50) as pool:
        checked = list(pool.map(guess, range(50)))
    counted(guesses=len(checked), checked=sum(checked))
    assert sum(checked) == 5


@pytest.mark.promise("P22", injected="five wrong passwords from elsewhere in the same office")
def test_a_device_that_has_logged_in_before_gets_through_and_has_five_guesses_of_its_own(
    guard: LoginGuard, counted: Callable[..., None]
) -> None:
    name, value = guard.device_cookie("ann")
    while wrong(guard, *ANN):
        pass
    let_in = right(guard, *ANN, **{name: value})
    checked = [wrong(guard, *ANN, **{name: value}) for _ in range(6)]
    counted(logins_by_cookie=int(let_in), wrong_passwords_with_it=len(checked), checked=sum(checked))
    assert let_in and checked == [True] * 5 + [False]
    assert not right(guard, *ANN, **{name: value})


def test_a_cookie_of_another_name_or_key_and_a_forged_one_are_none(guard: LoginGuard) -> None:
    name, value = guard.device_cookie("ann")
    while wrong(guard, *ANN):
        pass
    forged = [guard.device_cookie("bob")[1], LoginGuard(b"other", 16).device_cookie("ann")[1], "", ".", "x", "é.é"]
    for sent in (*forged, value[:-1], value + "0", "0" + value):
        assert not right(guard, *ANN, **{name: sent}), sent
    assert not right(guard, *ANN, **{guard.device_cookie("bob")[0]: value})


def test_guesses_at_one_name_from_many_addresses_end_and_known_devices_go_on(guard: LoginGuard) -> None:
    looked_at = sum(wrong(guard, f"198.51.{number}.1", "ann") for number in range(60))
    assert looked_at == 50 and not right(guard, "203.0.113.9", "ann")
    name, value = guard.device_cookie("ann")
    assert right(guard, "203.0.113.9", "ann", **{name: value})
    assert right(guard, "203.0.113.9", "bob")


def test_made_up_names_from_one_address_end_after_a_hundred(guard: LoginGuard) -> None:
    assert sum(wrong(guard, ANN[0], f"name{number}") for number in range(110)) == 100
    assert not right(guard, *ANN) and right(guard, "198.51.100.2", "ann")


def test_the_wait_is_told_and_then_over(clock: Clock) -> None:
    guard = LoginGuard(b"key", 16)
    for _ in range(5):
        wrong(guard, *ANN)
        clock.now += 1
    with pytest.raises(TooManyFailures) as refused, guard.attempt(*ANN, {}):
        pass
    assert refused.value.retry_after == pytest.approx(895)
    clock.now += 895.1
    assert right(guard, *ANN)


def test_refusals_are_told_of_once_a_minute(clock: Clock) -> None:
    guard, first = LoginGuard(b"key", 16), []
    for _ in range(5):
        wrong(guard, *ANN)
    for _ in range(130):
        with pytest.raises(TooManyFailures) as refused, guard.attempt(*ANN, {}):
            pass
        first.append(refused.value.first)
        clock.now += 1
    assert [second for second, told in enumerate(first) if told] == [0, 61, 122]


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
def test_an_ipv6_household_is_one_guesser(one: str, two: str, same: bool) -> None:
    guard = LoginGuard(b"key", 16)
    while wrong(guard, one, "ann"):
        pass
    assert right(guard, two, "ann") != same


@pytest.mark.parametrize("name", ["\ud800", "\x00", "x" * 100_000, "a/b"])
def test_any_text_can_be_tried_as_a_name(guard: LoginGuard, name: str) -> None:
    assert [wrong(guard, ANN[0], name) for _ in range(6)] == [True] * 5 + [False]


def test_replicas_share_what_redis_counts(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    guards = [sharing(redis_url) for _ in range(2)]
    assert [wrong(guards[number % 2], *ANN) for number in range(6)] == [True] * 5 + [False]


def test_without_redis_failures_are_counted_in_memory(redis_url: str) -> None:
    port = int(redis_url.rsplit(":", 1)[1].partition("/")[0])
    with FaultProxy(("127.0.0.1", port)) as proxy:
        guard = sharing(f"redis://127.0.0.1:{proxy.port}/0")
        proxy.mode = "refuse"
        assert [wrong(guard, *ANN) for _ in range(6)] == [True] * 5 + [False]
        assert proxy.injected


def test_an_address_holds_as_many_places_as_it_leaves_free() -> None:
    guard, held = LoginGuard(b"key", 16), []

    def hold(address: str) -> Any:
        turn = guard.attempt(address, f"name{len(held)}", {})
        turn.__enter__()
        held.append(turn)

    for address, places in (("a", 8), ("b", 4), ("c", 2), ("d", 1), ("e", 1)):
        for _ in range(places):
            hold(address)
        with pytest.raises(Overloaded):
            hold(address)
    for turn in held:
        turn.__exit__(None, None, None)
    held.clear()
    hold("a")
