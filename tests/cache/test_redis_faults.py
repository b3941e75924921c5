"""P17: whatever Redis does, it costs speed only, and little of that."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from statistics import median
from urllib.parse import urlsplit

import pytest

from cache.redis_cache import Breaker, RedisLink
from quotas.limits import RequestRate
from tests.faults import FaultProxy, Mode

UNTIL_OPEN, AFTER = 0.25, 0.005  # seconds a request, which counts itself, looks up and then keeps, may take longer
SLACK = 0.1  # for a machine that is busy with other things


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    return Breaker(faults=9, clock=clock)


@pytest.fixture
def proxy(redis_url: str) -> Iterator[FaultProxy]:
    parts = urlsplit(redis_url)
    with FaultProxy((str(parts.hostname), int(parts.port or 0))) as proxy:
        yield proxy


@pytest.fixture
def link(proxy: FaultProxy, breaker: Breaker) -> Iterator[RedisLink]:
    link = RedisLink(f"redis://127.0.0.1:{proxy.port}/0", breaker)
    yield link
    link.close()


@pytest.fixture
def cache(link: RedisLink, proxy: FaultProxy) -> Iterator[RedisLink]:
    cache = link
    cache.put("k", b"value", 60)
    assert cache.get("k") == b"value" and proxy.injected == 0
    yield cache
    cache.close()


def cost(link: RedisLink) -> float:
    """Seconds that Redis takes from one request."""
    cache, rate = link, RequestRate((link.redis, link.ask))
    started = time.perf_counter()
    rate.hit("ann", 1000)
    assert cache.get("k") is None
    cache.put("k", b"other", 60)
    return time.perf_counter() - started


@pytest.mark.promise(
    "P17",
    injected="refused, black hole, 5 s slow, garbage",
    counted="under 250 ms, then under 5 ms",
)
@pytest.mark.parametrize("mode", ["refuse", "black hole", "slow", "garbage"])
def test_a_fault_is_a_short_miss_and_then_a_free_one(
    cache: RedisLink,
    link: RedisLink,
    proxy: FaultProxy,
    breaker: Breaker,
    clock: Clock,
    mode: Mode,
    counted: Callable[..., None],
) -> None:
    proxy.mode = mode
    costs = [cost(link) for _ in range(3)]
    assert proxy.injected >= 9 and breaker.opened, "the fault was not injected"
    assert median(costs) < UNTIL_OPEN and max(costs) < UNTIL_OPEN + SLACK
    injected = proxy.injected
    free = [cost(link) for _ in range(50)]
    assert median(free) < AFTER and max(free) < AFTER + SLACK
    assert proxy.injected == injected, "an open breaker still asked"

    proxy.mode = "pass"
    clock.now += 5
    cache.put("k", b"healed", 60)
    healed = cache.get("k")
    counted(faults=injected, requests_served=len(costs) + len(free), hits_once_healed=int(healed == b"healed"))
    assert healed == b"healed" and not breaker.opened


def test_a_server_that_is_gone_is_a_short_miss(breaker: Breaker) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    link = RedisLink(f"redis://127.0.0.1:{port}/0", breaker)
    costs = [cost(link) for _ in range(3)]
    assert breaker.opened and max(costs) < UNTIL_OPEN + SLACK


@pytest.mark.promise("P17", injected="connections that hang, as behind a firewall", counted="under 250 ms")
def test_a_server_that_never_accepts_is_a_short_miss(breaker: Breaker, counted: Callable[..., None]) -> None:
    """A full backlog: the connection itself hangs, as behind a firewall that drops."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        with socket.create_connection(address):  # takes the only place
            link = RedisLink(f"redis://127.0.0.1:{address[1]}/0", breaker)
            costs = [cost(link) for _ in range(3)]
            counted(requests_served=len(costs), of_these_delayed=sum(seconds > 0.15 for seconds in costs))
            assert breaker.opened and max(costs) > 0.15, "nothing hung"
            assert median(costs) < UNTIL_OPEN and max(costs) < UNTIL_OPEN + SLACK
            link.close()


def test_a_request_lost_with_its_connection_is_tried_once_more(cache: RedisLink, proxy: FaultProxy) -> None:
    proxy.mode = "flap"
    for i in range(20):
        cache.put("k", b"%d" % i, 60)
        assert cache.get("k") == b"%d" % i
    assert proxy.injected == 40


@pytest.mark.promise("P17", injected="a server that comes and goes at 1 Hz")
def test_a_flapping_server_costs_no_error(
    cache: RedisLink, proxy: FaultProxy, clock: Clock, counted: Callable[..., None]
) -> None:
    modes: tuple[Mode, ...] = ("refuse", "pass", "garbage", "pass")
    found = []
    for second in range(20):
        proxy.mode = modes[second % 4]
        clock.now += 1
        cache.put("k", b"value", 60)
        found.append(cache.get("k"))
    counted(faults=proxy.injected, hits=found.count(b"value"), misses=found.count(None))
    assert set(found) == {b"value", None} and proxy.injected >= 10


LINES = b":5|$-5|$x|:x|$3|$99999999999|*99999999999|-ERR no|-LOADING wait|-OOM full|+\xff|_||HTTP/1.1 400 Bad Request"
SEVERAL = [b"+OK\n$5\nvalue", b"*2\n$1\na", b"%1\n+a\n+b", b">3\n+a\n+b\n+c", b"\n".join([b"*1"] * 20_000), b"$3\nab"]
REPLIES = [reply.replace(b"\n", b"\r\n") + b"\r\n" for reply in LINES.split(b"|") + SEVERAL]


@pytest.mark.promise("P17", injected="replies that are none of Redis")
@pytest.mark.parametrize("reply", REPLIES, ids=lambda reply: ascii(reply[:12]))
def test_no_reply_makes_it_raise(
    cache: RedisLink, proxy: FaultProxy, reply: bytes, counted: Callable[..., None]
) -> None:
    proxy.mode, proxy.garbage = "garbage", reply
    assert cache.get("k") is None or reply.startswith(b"+")
    cache.put("k", b"value", 60)
    assert proxy.injected >= 1
    proxy.mode = "pass"
    other = cache.get("other")
    counted(bad_replies=proxy.injected, taken_for_another_request=int(other is not None))
    assert other is None, "a reply to an earlier request was taken for this one's"
