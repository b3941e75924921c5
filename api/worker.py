"""gunicorn's worker of threads, except that a request takes a thread only when all of it is here.

A client that sends slowly, stops in the middle or does not hang up costs a place in the poller and nothing else.
Answers nothing itself but what never becomes a request.
"""

from __future__ import annotations

import json
import socket
import time
from concurrent.futures import Future
from functools import partial
from http import HTTPStatus
from selectors import EVENT_READ
from typing import Any

from gunicorn.http.errors import LimitRequestHeaders, LimitRequestLine, ParseException  # type: ignore[import-untyped]
from gunicorn.workers.gthread import TConn, ThreadWorker  # type: ignore[import-untyped]

from api.arrival import Arrival, TooLong

HURRY = 8.0  # seconds less for what arrives, once the service stops
LEAVE = 2.0  # seconds in which a connection that is being closed may read why
CONNECTIONS = 1000  # that a request arrives on at the same time; when there are more, the oldest makes room
LEAVING = 100  # connections that are being closed at the same time; when there are more, likewise
MEMORY = 64 << 20  # bytes of them together
_PIECE = 64 << 10

_WORDS = {
    400: ("malformed", "This is not HTTP as it should be."),
    408: ("request_timeout", "The request took too long to arrive."),
    413: ("too_large", "The body is too large."),
    414: ("uri_too_long", "The address is too long."),
    431: ("headers_too_large", "The headers are too large."),
}


class PatientWorker(ThreadWorker):  # type: ignore[misc]
    """most: bytes of a body that is waited for; a larger one is the app's to refuse."""

    most = 1 << 20

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._arriving: dict[TConn, tuple[float, Arrival]] = {}  # in the order of their beginning
        self._leaving: dict[TConn, float] = {}
        self._room = max(1, self.worker_connections - self.cfg.threads - LEAVING)

    def enqueue_req(self, conn: TConn) -> None:
        """On the main thread, for a new connection or one that has more to say: wait for the whole request."""
        conn.init()
        conn.sock.setblocking(False)
        self._arriving[conn] = (time.monotonic(), Arrival(self.most))
        self.poller.register(conn.sock, EVENT_READ, partial(self._read, conn))
        self._take(conn, conn.parser.unreader.take_buffered() or None)
        self._make_room()

    def _read(self, conn: TConn, _: Any = None) -> None:
        self._take(conn, None)

    def _take(self, conn: TConn, more: bytes | None) -> None:
        """Add what there is (`more`, or what the socket holds) to the request of this connection."""
        arrival = self._arriving[conn][1]
        try:
            more = conn.sock.recv(_PIECE) if more is None else more
            if arrival.add(more) or not more:
                self._hand_over(conn, arrival)
        except BlockingIOError:
            return
        except OSError:
            self._end(conn)
        except TooLong as error:
            self._turn_away(conn, error.status)

    def _hand_over(self, conn: TConn, arrival: Arrival) -> None:
        """A thread may have it. Also half a request, when its sender has hung up: gunicorn knows what to say."""
        if not arrival.bytes:
            return self._end(conn)
        self._forget(conn)
        conn.whole = arrival.whole
        conn.parser.unreader.unread(bytes(arrival.bytes))
        super().enqueue_req(conn)

    def _keepalive_after(self, conn: TConn, keepalive: Any) -> bool:
        """In a thread: what did not come whole is not waited for now either."""
        return bool(conn.whole and super()._keepalive_after(conn, keepalive))

    def finish_request(self, conn: TConn, done: Future[Any]) -> None:
        """On the main thread, which gunicorn would let wait for the client to hang up: the poller waits here."""
        if not done.cancelled() and done.exception() is None and done.result():
            super().finish_request(conn, done)
        else:
            self._let_go(conn)

    def murder_pending(self) -> None:
        """About every second: end what has taken too long to come, or to go."""
        now = time.monotonic()
        hurry = 0.0 if self.alive else HURRY
        for conn in [late for late, (begun, some) in self._arriving.items() if some.overdue(now - begun + hurry)]:
            self._turn_away(conn, 408)
        for conn in [late for late, begun in self._leaving.items() if now - begun > LEAVE]:
            self._end(conn)

    def _make_room(self) -> None:
        held = sum(len(arrival.bytes) for _, arrival in self._arriving.values())
        while self._arriving and (len(self._arriving) > self._room or held > MEMORY):
            oldest = next(iter(self._arriving))
            held -= len(self._arriving[oldest][1].bytes)
            self._turn_away(oldest, 408)

    def _turn_away(self, conn: TConn, status: int) -> None:
        if self._arriving[conn][1].bytes:  # who never said a word is not spoken to
            self._say(conn.sock, status)
        self._forget(conn)
        self._let_go(conn)

    def _let_go(self, conn: TConn) -> None:
        """Say that nothing follows, and read what is still coming: a reset would take our last words away."""
        try:
            conn.sock.setblocking(False)
            conn.sock.shutdown(socket.SHUT_WR)
        except OSError:
            return self._end(conn)
        self._leaving[conn] = time.monotonic()
        self.poller.register(conn.sock, EVENT_READ, partial(self._drain, conn))
        if len(self._leaving) > LEAVING:
            self._end(next(iter(self._leaving)))

    def _drain(self, conn: TConn, _: Any = None) -> None:
        try:
            gone = not conn.sock.recv(_PIECE)
        except BlockingIOError:
            return
        except OSError:
            gone = True
        if gone:
            self._end(conn)

    def _end(self, conn: TConn) -> None:
        self._forget(conn)
        self.nr_conns -= 1
        conn.close()

    def _forget(self, conn: TConn) -> None:
        known = [self._arriving.pop(conn, None), self._leaving.pop(conn, None)]
        if any(known):
            self.poller.unregister(conn.sock)

    def handle_error(self, req: Any, client: socket.socket, addr: Any, error: Exception) -> None:
        """What is not HTTP is the client's fault, told in our shape and without a word of what was sent."""
        if not isinstance(error, ParseException):
            super().handle_error(req, client, addr, error)
            return
        self.log.warning("not a request: %s", type(error).__name__)
        statuses: dict[type[Exception], int] = {LimitRequestHeaders: 431, LimitRequestLine: 414}
        self._say(client, statuses.get(type(error), 400))

    def _say(self, client: socket.socket, status: int) -> None:
        code, words = _WORDS[status]
        detail = {"message": words, "type": "invalid_request_error", "code": code, "param": None, "request_id": None}
        body = json.dumps({"error": detail})
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n"
        try:
            client.send((head + body).encode())
        except OSError:
            return  # it is gone, or its buffer is full of what it does not read
