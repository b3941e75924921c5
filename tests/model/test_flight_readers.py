"""The readers of one shared generation: each waits, leaves and runs out of time by itself."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest

from errors import DeadlineExceeded
from model.flight import Flights
from model.types import Chunk, Done, FinishReason, GenerateRequest, Stream, Usage
from tests.model.test_flight import END, REQUEST, Source, chunks, events, join, never


def test_a_reader_that_stops_reading_starves_nobody() -> None:
    flights, source = Flights(), Source(*chunks(50), END)
    idle, _ = join(flights, "k", lambda: source)
    busy, _ = join(flights, "k", never)
    assert idle.get(5) == Chunk("0 ")
    assert list(events(busy)) == [*chunks(50), END]
    assert list(events(idle)) == [*chunks(50)[1:], END]


def test_one_event_wakes_everyone_who_waits() -> None:
    flights, source = Flights(), Source()
    readers = [join(flights, "k", lambda: source)[0] for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(reader.get, 30) for reader in readers]
        source.queue.put(Chunk("a"))
        assert [answer.result(timeout=5) for answer in answers] == [Chunk("a")] * 4


def test_close_wakes_a_reader_that_waits_in_another_thread() -> None:
    flights, source = Flights(), Source()
    waiting, _ = join(flights, "k", lambda: source)
    other, _ = join(flights, "k", never)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(waiting.get, 30)
        waiting.close()
        assert answer.result(timeout=5) == Done(FinishReason.CANCELLED, Usage(3, 0))
    assert source.closed == 0
    other.close()


def test_a_reader_that_cancels_while_its_twin_reads_on_hears_what_it_was_given() -> None:
    flights, source = Flights(), Source(Chunk("hm", "reasoning"), *chunks(3))
    one, _ = join(flights, "k", lambda: source)
    twin, _ = join(flights, "k", never)
    assert [one.get(5), one.get(5), twin.get(5)] == [Chunk("hm", "reasoning"), Chunk("0 "), Chunk("hm", "reasoning")]
    one.close()
    assert one.get(5) == Done(FinishReason.CANCELLED, Usage(3, 2, reasoning_tokens=1))
    source.queue.put(END)
    assert list(events(twin)) == [*chunks(3), END]


def test_each_reader_has_its_own_time_and_whoever_comes_too_late_for_that_starts_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, flights, source, asked = [0.0], Flights(), Source(), []
    monkeypatch.setattr("model.flight.time", SimpleNamespace(monotonic=lambda: now[0]))

    def start(request: GenerateRequest) -> Stream:
        asked.append(request)
        return source

    leader, _ = flights.join("k", REQUEST, start)
    now[0] = 9.0
    follower, follows = flights.join("k", REQUEST, start)
    assert (follows, asked) == (False, [replace(REQUEST, timeout=20)])
    now[0] = 10.0
    with pytest.raises(DeadlineExceeded):
        leader.get(5)
    leader.close()
    source.queue.put(Chunk("in time"))
    assert follower.get(5) == Chunk("in time")
    now[0] = 11.0
    assert join(flights, "k", lambda: Source(END))[1], "nine seconds are left, and it may take ten"
    now[0] = 18.9
    source.queue.put(Chunk("still"))
    assert follower.get(5) == Chunk("still")
    now[0] = 19.0
    with pytest.raises(DeadlineExceeded):
        follower.get(5)
    assert source.closed == 0
    follower.close()
    assert source.closed == 1


def test_a_timeout_is_kept_whoever_pumps() -> None:
    flights = Flights()
    source = Source()
    readers = [join(flights, "k", lambda: source)[0] for _ in range(4)]
    started = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda reader: reader.get(0.05), readers)) == [None] * 4
    assert time.monotonic() - started < 2
