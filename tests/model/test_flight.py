"""Who starts a shared generation, who follows, and how it ends."""

from __future__ import annotations

import gc
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from errors import GenerationFailed
from model.flight import Flights
from model.types import Chunk, Done, Event, FinishReason, GenerateRequest, Status, Stream, Usage

END = Done(FinishReason.STOP, Usage(3, 5))
REQUEST = GenerateRequest("id", "ann", "model", (), timeout=10, prompt_ids=(1, 2, 3))


class Source:
    """A generation by hand: a queue of events, as the engine's streams are."""

    def __init__(self, *events: Event | Exception) -> None:
        self.queue: queue.Queue[Event | Exception] = queue.Queue()
        self.closed = 0
        for event in events:
            self.queue.put(event)

    def get(self, timeout: float) -> Event | None:
        try:
            event = self.queue.get(timeout=timeout)
        except queue.Empty:
            return None
        if isinstance(event, Exception):
            raise event
        return event

    def close(self) -> None:
        self.closed += 1
        self.queue.put(Done(FinishReason.CANCELLED, Usage()))


def chunks(count: int) -> list[Chunk]:
    return [Chunk(f"{number} ") for number in range(count)]


def events(stream: Stream, timeout: float = 5) -> Iterator[Event]:
    """Every event up to Done; fails when none comes in time."""
    while True:
        event = stream.get(timeout)
        assert event is not None, "no event in time"
        yield event
        if isinstance(event, Done):
            return


def join(flights: Flights, key: str, start: Callable[[], Stream]) -> tuple[Stream, bool]:
    return flights.join(key, REQUEST, lambda _: start())


def never() -> Stream:
    raise AssertionError("started a second time")


def test_only_the_first_starts_and_everyone_gets_the_same() -> None:
    flights, source = Flights(), Source(*chunks(3), END)
    first, leads = join(flights, "k", lambda: source)
    second, follows = join(flights, "k", never)
    assert (leads, follows) == (True, False)
    assert list(events(first)) == list(events(second)) == [*chunks(3), END]


def test_other_keys_fly_alone() -> None:
    flights = Flights()
    a, _ = join(flights, "a", lambda: Source(Chunk("a"), END))
    b, leads = join(flights, "b", lambda: Source(Chunk("b"), END))
    assert leads and next(events(a)) == Chunk("a") and next(events(b)) == Chunk("b")


def test_a_late_reader_gets_every_chunk_but_no_stale_status() -> None:
    flights, source = Flights(), Source(Status("queued", position=2), Status("loading", percent=9), *chunks(2))
    first, _ = join(flights, "k", lambda: source)
    assert [first.get(5), first.get(5)] == [Status("queued", position=2), Status("loading", percent=9)]
    assert [first.get(5), first.get(5)] == chunks(2)
    late, _ = join(flights, "k", never)
    source.queue.put(END)
    assert list(events(late)) == [*chunks(2), END]


def test_a_late_reader_gets_only_the_latest_status() -> None:
    flights, source = Flights(), Source(Status("queued", position=2), Status("queued", position=1))
    first, _ = join(flights, "k", lambda: source)
    assert [first.get(5), first.get(5)] == [Status("queued", position=2), Status("queued", position=1)]
    late, _ = join(flights, "k", never)
    assert late.get(0) == Status("queued", position=1)
    assert late.get(0) is None


def test_the_leader_may_leave_and_the_others_go_on() -> None:
    flights, source = Flights(), Source(*chunks(1))
    leader, _ = join(flights, "k", lambda: source)
    follower, _ = join(flights, "k", never)
    assert leader.get(5) == Chunk("0 ")
    leader.close()
    source.queue.put(END)
    assert list(events(follower)) == [*chunks(1), END]
    assert source.closed == 0


def test_the_last_close_closes_the_source_once_and_the_next_request_starts_anew() -> None:
    flights, source = Flights(), Source(*chunks(1))
    readers = [join(flights, "k", lambda: source)[0] for _ in range(3)]
    for reader in readers * 2:
        reader.close()
    assert source.closed == 1
    assert readers[0].get(5) == Done(FinishReason.CANCELLED, Usage())
    assert join(flights, "k", lambda: Source(END))[1]


def test_an_error_reaches_every_reader_after_what_came_before() -> None:
    flights, source = Flights(), Source(Chunk("a"), GenerationFailed("numbers that are not numbers"))
    readers = [join(flights, "k", lambda: source)[0] for _ in range(3)]
    for reader in readers:
        assert reader.get(5) == Chunk("a")
        with pytest.raises(GenerationFailed, match="not numbers"):
            reader.get(5)
    assert len(flights) == 0


def test_what_start_raises_is_raised_and_leaves_nothing_behind() -> None:
    flights = Flights()
    with pytest.raises(AssertionError, match="second time"):
        join(flights, "k", never)
    assert len(flights) == 0


def test_an_ended_flight_is_forgotten() -> None:
    flights = Flights()
    source = Source(*chunks(2), END)
    gone = weakref.ref(source)
    reader, _ = join(flights, "k", lambda: source)
    assert list(events(reader))[-1] == END
    assert len(flights) == 0
    reader.close()
    assert source.closed == 0  # it ended by itself
    reader = source = None
    gc.collect()
    assert gone() is None


def test_thirty_two_threads_share_one_generation_though_some_leave_early() -> None:
    flights, started = Flights(), []
    everyone = threading.Barrier(33)  # the readers and the generation

    def start() -> Stream:
        source = Source(Status("queued", position=1))
        started.append(source)

        def speak() -> None:
            everyone.wait(timeout=10)
            for event in [*chunks(100), END]:
                source.queue.put(event)

        threading.Thread(target=speak).start()
        return source

    def read(number: int) -> list[Event] | None:
        stream, _ = join(flights, "k", start)
        everyone.wait(timeout=10)
        try:
            if number % 4 == 0:  # leaves early, the leader perhaps among them
                stream.get(5)
                return None
            return [event for event in events(stream) if not isinstance(event, Status)]
        finally:
            stream.close()

    with ThreadPoolExecutor(32) as pool:
        results = list(pool.map(read, range(32)))
    whole = [result for result in results if result is not None]
    assert len(whole) == 24 and all(result == [*chunks(100), END] for result in whole)
    assert len(started) == 1 and len(flights) == 0
