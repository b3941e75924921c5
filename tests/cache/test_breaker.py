"""The breaker, on a clock that the test turns."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from cache.redis_cache import Breaker


class Watched(Breaker):
    """A breaker with a clock to turn."""

    def __init__(self, faults: int = 3, rest: float = 5.0) -> None:
        self.now = 0.0
        super().__init__(faults, rest, lambda: self.now)


@pytest.fixture
def breaker() -> Watched:
    return Watched()


def fail(breaker: Breaker, times: int) -> None:
    for _ in range(times):
        assert breaker.allows()
        breaker.failed()


def test_it_opens_after_faults_in_a_row(breaker: Watched) -> None:
    fail(breaker, 2)
    assert breaker.allows() and not breaker.opened
    breaker.failed()
    assert breaker.opened and not breaker.allows()


def test_a_success_between_faults_starts_the_count_again(breaker: Watched) -> None:
    for _ in range(10):
        fail(breaker, 2)
        breaker.succeeded()
    assert breaker.allows() and not breaker.opened


def test_one_probe_a_rest_may_try(breaker: Watched) -> None:
    fail(breaker, 3)
    breaker.now += 4.9
    assert not breaker.allows()
    breaker.now += 0.1
    assert breaker.allows() and not breaker.allows()
    breaker.failed()
    assert not breaker.allows() and breaker.opened
    breaker.now += 5
    assert breaker.allows()


def test_a_probe_that_succeeds_closes_it(breaker: Watched) -> None:
    fail(breaker, 3)
    breaker.now += 5
    assert breaker.allows()
    breaker.succeeded()
    assert all(breaker.allows() for _ in range(10)) and not breaker.opened


def test_a_probe_that_never_reports_does_not_close_the_door_for_good(breaker: Watched) -> None:
    fail(breaker, 3)
    breaker.now += 5
    assert breaker.allows() and not breaker.allows()
    breaker.now += 5
    assert breaker.allows()


def test_of_32_threads_one_probes(breaker: Watched) -> None:
    fail(breaker, 3)
    breaker.now += 5
    with ThreadPoolExecutor(32) as pool:
        assert sum(pool.map(lambda _: breaker.allows(), range(320))) == 1
