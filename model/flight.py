"""Identical requests in flight share one generation.

Stores nothing and knows no cache: an ended flight is forgotten.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace

from errors import DeadlineExceeded
from model.types import Chunk, Done, Event, FinishReason, GenerateRequest, Status, Stream, Usage

Submit = Callable[[GenerateRequest], Stream]

# A pumping reader looks up this often whether it was closed meanwhile, in seconds.
_SLICE = 0.25


class Flights:
    """The generations that may still be joined, by key."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._flights: dict[str, _Flight] = {}

    def join(self, key: str, request: GenerateRequest, start: Submit) -> tuple[Stream, bool]:
        """A stream of the generation under `key`, and whether this call started it.

        `start` must not block (submitting does not); what it raises is raised here. A late reader gets every
        earlier chunk again, and as much time as if it were the first: `start` is given a request with time for two,
        and whoever comes when less than its own is left starts anew. The source is closed when its last reader
        closes, not before.
        """
        while True:
            with self._lock:
                if leads := key not in self._flights:
                    source = start(replace(request, timeout=2 * request.timeout))
                    until = time.monotonic() + 2 * request.timeout
                    self._flights[key] = _Flight(source, until, lambda ended: self._forget(key, ended))
                flight = self._flights[key]
            if reader := flight.board(request):
                return reader, leads
            self._forget(key, flight)

    def __len__(self) -> int:
        return len(self._flights)

    def _forget(self, key: str, flight: _Flight) -> None:
        with self._lock:
            if self._flights.get(key) is flight:
                del self._flights[key]


class _Flight:
    """One source and what it has said so far. Whichever reader waits pumps; the others wait for that one."""

    def __init__(self, source: Stream, until: float, on_end: Callable[[_Flight], None]) -> None:
        self.news = threading.Condition()
        self.events: list[Chunk | Done] = []
        self.status: Status | None = None  # only the latest counts, and none once text has come
        self.error: Exception | None = None
        self._source, self._until, self._on_end = source, until, on_end
        self._readers = 0
        self._pumping = self._over = False

    def board(self, request: GenerateRequest) -> _Reader | None:
        """One more reader, or None when it is too late."""
        deadline = time.monotonic() + request.timeout
        with self.news:
            if self._over or deadline > self._until:
                return None
            self._readers += 1
            return _Reader(self, deadline, len(request.prompt_ids))

    def leave(self) -> bool:
        """One reader less, while `news` is held. True for the last one, who then has to `abandon`."""
        self._readers -= 1
        last = self._readers == 0 and not self._over
        self._over |= last
        return last

    def abandon(self) -> None:
        self._on_end(self)
        self._source.close()

    def farewell(self, given: Usage) -> Done | None:
        """What a closed reader hears; None while the source, closed with its last reader, has yet to count its tokens.

        Where others read on, it is what this one was given.
        """
        if self._readers or self.error is not None:
            return Done(FinishReason.CANCELLED, given)
        last = self.events[-1] if self.events else None
        return replace(last, finish_reason=FinishReason.CANCELLED) if isinstance(last, Done) else None

    def wait(self, seconds: float) -> None:
        """Wait for news, for at most `seconds`; `news` is held before and after, and given up in between."""
        if self._pumping:
            self.news.wait(seconds)
            return
        self._pumping = True
        self.news.release()
        event: Event | None = None
        error: Exception | None = None
        try:
            event = self._source.get(min(seconds, _SLICE))
        except Exception as failure:  # whatever ended the source ends every reader, never only this one
            error = failure
        finally:
            self.news.acquire()
            self._pumping = False
            self._record(event, error)
            self.news.notify_all()
        if self._over:
            self._on_end(self)

    def _record(self, event: Event | None, error: Exception | None) -> None:
        if isinstance(event, Status):
            self.status = event
        elif event is not None:
            self.status = None
            self.events.append(event)
        self.error = self.error or error
        self._over |= isinstance(event, Done) or error is not None


class _Reader:
    """One request's view of a flight: a Stream. `deadline` by time.monotonic."""

    def __init__(self, flight: _Flight, deadline: float, prompt_tokens: int) -> None:
        self._flight = flight
        self._deadline = deadline
        self._prompt_tokens = prompt_tokens
        self._position = 0
        self._status: Status | None = None
        self._closed = False

    def get(self, timeout: float) -> Event | None:
        end = time.monotonic() + timeout
        with self._flight.news:
            while True:
                if (event := self._next()) is not None:
                    return event
                now = time.monotonic()
                if now >= self._deadline:
                    raise DeadlineExceeded("the request took longer than it may")
                if now >= end:
                    return None
                self._flight.wait(min(end, self._deadline) - now)

    def close(self) -> None:
        with self._flight.news:
            if self._closed:
                return
            self._closed = True
            last = self._flight.leave()
            self._flight.news.notify_all()
        if last:
            self._flight.abandon()

    def _next(self) -> Event | None:
        flight = self._flight
        if self._closed:
            return flight.farewell(self._given())
        if self._position < len(flight.events):
            self._position += 1
            return flight.events[self._position - 1]
        if flight.error is not None:
            raise flight.error.with_traceback(None)  # shared: each reader would add its own frames
        if flight.status is not self._status:
            self._status = flight.status
            return flight.status
        return None

    def _given(self) -> Usage:
        """A chunk is a token, or more where one alone was no whole character."""
        read = [event for event in self._flight.events[: self._position] if isinstance(event, Chunk)]
        reasoning = sum(chunk.channel == "reasoning" for chunk in read)
        return Usage(self._prompt_tokens, len(read), reasoning_tokens=reasoning)
