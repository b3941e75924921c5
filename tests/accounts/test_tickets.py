"""Single-use tickets, in memory and in Redis."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import redis

from accounts import tickets as module
from accounts.tickets import MAX_BYTES, MAX_TICKETS, Tickets
from cache.redis_cache import RedisLink
from crypto import Encryptor
from errors import RateLimited, TooLarge
from tests.faults import Clock, FaultProxy

KEY = bytes(32)


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock(time.time)
    monkeypatch.setattr(module, "time", SimpleNamespace(time=clock, monotonic=time.monotonic))
    return clock


@pytest.fixture
def url(redis_url: str) -> str:
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    return redis_url


@pytest.fixture(params=["memory", "redis"])
def tickets(request: pytest.FixtureRequest, clock: Clock) -> Tickets:
    return sharing(request.getfixturevalue("url")) if request.param == "redis" else Tickets(Encryptor(KEY))


def sharing(url: str) -> Tickets:
    link = RedisLink(url)
    return Tickets(Encryptor(KEY), (link.redis, link.ask))


def test_a_ticket_is_taken_once(tickets: Tickets, clock: Clock) -> None:
    made = tickets.put("ann", b"content \x00", clock() + 60)
    assert tickets.take("another") is None and tickets.take("\ud800") is None
    assert tickets.take(made) == b"content \x00"
    assert tickets.take(made) is None


def test_of_many_takers_one_gets_it(tickets: Tickets, clock: Clock) -> None:
    for _ in range(5):
        made = tickets.put("ann", b"x", clock() + 60)
        with ThreadPoolExecutor(8) as pool:
            taken = list(pool.map(lambda _, ticket=made: tickets.take(ticket), range(8)))
        assert taken.count(b"x") == 1 and taken.count(None) == 7


def test_an_expired_ticket_is_none_and_makes_room(tickets: Tickets, clock: Clock) -> None:
    made = [tickets.put("ann", b"x", clock() + 60) for _ in range(MAX_TICKETS)]
    with pytest.raises(RateLimited):
        tickets.put("ann", b"x", clock() + 60)
    clock.offset = 61
    assert tickets.take(made[0]) is None
    tickets.put("ann", b"x", clock() + 60)


def test_each_user_has_sixteen_and_a_used_one_makes_room(tickets: Tickets, clock: Clock) -> None:
    made = [tickets.put("ann", b"x", clock() + 60) for _ in range(MAX_TICKETS)]
    with pytest.raises(RateLimited):
        tickets.put("ann", b"x", clock() + 60)
    tickets.put("bob", b"x", clock() + 60)
    tickets.take(made[3])
    tickets.put("ann", b"x", clock() + 60)


def test_a_ticket_is_bounded_in_size(tickets: Tickets, clock: Clock) -> None:
    assert tickets.take(tickets.put("ann", b"x" * MAX_BYTES, clock() + 60)) == b"x" * MAX_BYTES
    with pytest.raises(TooLarge, match="64 KiB"):
        tickets.put("ann", b"x" * (MAX_BYTES + 1), clock() + 60)


def test_memory_is_bounded_in_all(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_MEMORY", 10_000)
    tickets = Tickets(Encryptor(KEY))
    made = [tickets.put(f"user{number}", b"x" * 1000, clock() + 60) for number in range(10)]
    with pytest.raises(RateLimited):
        tickets.put("another", b"x", clock() + 60)
    tickets.take(made[0])
    tickets.put("another", b"x", clock() + 60)


def test_redis_holds_neither_ticket_nor_content_in_plain_text(url: str, clock: Clock) -> None:
    made = sharing(url).put("ann", b"a private prompt", clock() + 60)
    with redis.Redis.from_url(url) as client:
        found = {name: client.type(name) for name in client.scan_iter()}
        values = b"".join(client.get(name) for name, kind in found.items() if kind == b"string")
        assert len(found) == 2 and all(0 < client.ttl(name) <= 60 for name in found)
    assert b"private" not in values and made.encode() not in values + b"".join(found)


def test_replicas_share_tickets(url: str, clock: Clock) -> None:
    one, two = (sharing(url) for _ in range(2))
    made = one.put("ann", b"x", clock() + 60)
    assert two.take(made) == b"x" and one.take(made) is None


@pytest.mark.promise("P17", injected="a Redis that resets every connection")
def test_without_redis_tickets_are_kept_in_memory(url: str, clock: Clock, counted: Callable[..., None]) -> None:
    port = int(url.rsplit(":", 1)[1].partition("/")[0])
    with FaultProxy(("127.0.0.1", port)) as proxy:
        tickets = sharing(f"redis://127.0.0.1:{proxy.port}/0")
        proxy.mode = "refuse"
        taken = tickets.take(tickets.put("ann", b"x", clock() + 60))
        counted(connections_reset=proxy.injected, tickets_used=int(taken == b"x"))
        assert proxy.injected and taken == b"x"
