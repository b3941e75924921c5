"""Events on the wire: how they are framed, and how a client that went away is noticed."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any, Protocol

from flask import Response

from api.errors import translate
from errors import ClientGone, ServiceError
from model.types import Done, Event, Stream

_POLL = 0.1  # seconds between two looks at the client's socket: what a gone client costs at most
_BEAT = 5.0  # seconds of silence before a comment; proxies give up at 60
_RECHECK = 1.0  # seconds between two looks at the caller's token: so long a disabled user's streams go on
PING = b": ping\n\n"
# No line breaks in EventSource or JSON, but in many a client that splits text into lines (Python's str.splitlines).
_BREAKS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
DOCUMENTED: dict[str, Any] = {"content": {"text/event-stream": {"schema": {"type": "object"}}}}

Check = Callable[[], object]


class Dialect(Protocol):
    """How events are written: one or more frames for each."""

    def event(self, event: Event) -> bytes: ...

    def error(self, error: ServiceError) -> bytes: ...


def frame(fields: Mapping[str, Any], *, event: str | None = None, id: int | None = None) -> bytes:
    """One event; its data is one line, because JSON escapes every line break."""
    head = (f"id: {id}\n" if id is not None else "") + (f"event: {event}\n" if event else "")
    return f"{head}data: {_encode(fields).translate(_BREAKS)}\n\n".encode()


def client_check(environ: Mapping[str, Any]) -> Check:
    """A check that raises ClientGone once the client of this WSGI request has closed its side.

    WSGI tells of a gone client only when something is written; gunicorn lends the socket to look at meanwhile.
    """
    client: socket.socket | None = environ.get("gunicorn.socket")
    if client is None:
        return lambda: None

    def check() -> None:
        try:
            gone = client.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return
        except OSError:
            gone = True
        if gone:
            raise ClientGone("The client went away.")

    return check


def watched(
    stream: Stream, client: Check, token: Check, clock: Callable[[], float] = time.monotonic
) -> Iterator[Event | None]:
    """The events of `stream`, and None for each silence of a few seconds.

    Raises ClientGone, or the ServiceError of the stream or of `token`, the caller's right to go on.
    """
    spoken = looked = rechecked = clock()
    while True:
        event = stream.get(_POLL)
        now = clock()
        if now - looked >= _POLL or event is None:
            looked = now
            client()
        if now - rechecked >= _RECHECK:
            rechecked = now
            token()
        if event is not None or now - spoken >= _BEAT:
            spoken = now
            yield event
        if isinstance(event, Done):
            return


def respond(events: Iterator[Event | None], dialect: Dialect, close: Callable[[], None]) -> Response:
    """A streamed response. The first event is awaited here, so that an early failure keeps its own status."""
    with ExitStack() as failed:
        failed.callback(close)
        first = next(events)
        failed.pop_all()
    response = Response(_written(first, events, dialect), content_type="text/event-stream; charset=utf-8")
    response.headers["Cache-Control"] = "no-cache"
    response.headers["X-Accel-Buffering"] = "no"
    response.call_on_close(close)  # also where the server never asks for a byte
    return response


def _written(event: Event | None, events: Iterator[Event | None], dialect: Dialect) -> Iterator[bytes]:
    try:
        while True:
            yield dialect.event(event) if event is not None else PING
            event = next(events)
    except (ClientGone, StopIteration):
        return
    except Exception as error:  # the thread's boundary: the status is sent, only an error event is left
        yield dialect.error(translate(error))
