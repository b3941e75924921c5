"""Heartbeats, rechecks and the end of a watched stream, on a clock of our own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest

from api import sse
from errors import ServiceError, Unauthorized
from model.types import Chunk, Done, Event, FinishReason, Usage

DONE = Done(FinishReason.STOP, Usage())


class Slow:
    """A stream in which each event comes after so many seconds of the test's clock."""

    def __init__(self, *events: tuple[float, Event]) -> None:
        self.now = 0.0
        self._events = [(sum(wait for wait, _ in events[: n + 1]), event) for n, (_, event) in enumerate(events)]

    def get(self, timeout: float) -> Event | None:
        due, event = self._events[0]
        if due > self.now + timeout:
            self.now += timeout
            return None
        self.now = max(self.now, due)
        self._events.pop(0)
        return event

    def close(self) -> None: ...


def watch(stream: Slow, client: sse.Check = lambda: None, token: sse.Check = lambda: None) -> Iterator[Event | None]:
    return sse.watched(stream, client, token, clock=lambda: stream.now)


def test_silence_is_broken_often_enough() -> None:
    stream = Slow((34, Chunk("a")), (1, DONE))
    times = []
    for event in watch(stream):
        times.append(stream.now)
        last = event
    assert last is DONE
    assert max(later - earlier for earlier, later in zip([0.0, *times], times, strict=False)) <= 10


def test_a_talking_stream_has_no_heartbeat() -> None:
    assert None not in list(watch(Slow(*[(1.0, Chunk("a"))] * 30, (0, DONE))))


def test_the_client_is_looked_at_while_nothing_is_said_and_while_much_is() -> None:
    for stream in (Slow((2, DONE)), Slow(*[(0.01, Chunk("a"))] * 200, (0, DONE))):
        looks: list[float] = []
        list(watch(stream, client=lambda looks=looks, stream=stream: looks.append(stream.now)))
        gaps = [later - earlier for earlier, later in zip([0.0, *looks], looks, strict=False)]
        assert max(gaps) <= 0.15 and len(looks) < 30


@pytest.mark.promise(
    "P18", injected="a token revoked in the middle of its stream", counted="of 100, within two seconds"
)
def test_a_token_that_was_revoked_ends_the_stream_within_two_seconds(counted: Callable[..., None]) -> None:
    stream, sent = Slow(*[(0.5, Chunk("a"))] * 100, (0, DONE)), []

    def revoked() -> None:
        raise Unauthorized("The token is no longer valid.")

    with pytest.raises(Unauthorized):
        for event in watch(stream, token=revoked):
            sent.append(event)
    counted(event_sent=len(sent))
    assert 0.5 < stream.now <= 2


class Words:
    def event(self, event: Event) -> bytes:
        return sse.frame({"text": getattr(event, "text", "end")})

    def error(self, error: ServiceError) -> bytes:
        return sse.frame({"code": error.code}, event="error")


def body(events: Iterator[Event | None]) -> tuple[bytes, list[str]]:
    closed: list[str] = []
    response = sse.respond(events, Words(), lambda: closed.append("closed"))
    written = b"".join(response.response)
    response.close()
    return written, closed


def test_a_heartbeat_is_a_comment() -> None:
    written, closed = body(iter([None, Chunk("a"), DONE]))
    assert written == b': ping\n\ndata: {"text": "a"}\n\ndata: {"text": "end"}\n\n'
    assert closed == ["closed"]


def test_a_gone_client_is_sent_nothing_more() -> None:
    def events() -> Iterator[Event | None]:
        yield Chunk("a")
        raise sse.ClientGone("The client went away.")

    assert body(events()) == (b'data: {"text": "a"}\n\n', ["closed"])


def test_a_failure_before_the_first_event_closes_and_raises() -> None:
    def events() -> Iterator[Event | None]:
        raise ServiceError("down")
        yield None

    closed: list[str] = []
    with pytest.raises(ServiceError):
        sse.respond(events(), Words(), lambda: closed.append("closed"))
    assert closed == ["closed"]


def test_a_frame_is_one_line_of_json_whatever_it_says() -> None:
    text = "a\nb\r\n\ndata: [DONE]\u2028\u2029\x85\x1c\x0b"
    lines = sse.frame({"text": text}, event="x", id=3).decode().splitlines()
    assert lines[:2] == ["id: 3", "event: x"] and lines[3:] == [""]
    assert json.loads(lines[2].removeprefix("data: ")) == {"text": text}
