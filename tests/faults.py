"""What the tests break on purpose: the network to a server (and how often it was broken), and the clock.

Knows no protocol: the proxy looks only at when bytes pass.
"""

from __future__ import annotations

import itertools
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Literal

# refuse: connections are reset; black hole: bytes vanish; slow: they wait; flap: every second request is reset.
Mode = Literal["pass", "refuse", "black hole", "slow", "garbage", "flap"]
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER of 0 seconds: close sends a reset


class Clock:
    """The time of day of `now`, and `offset` seconds more: set it to make the clock jump."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.offset = 0.0
        self._now = now

    def __call__(self) -> float:
        return self._now() + self.offset


class FaultProxy:
    """Listens on `port` of loopback for as long as it is entered. Set `mode` at any time; `injected` counts faults."""

    def __init__(self, server: tuple[str, int], delay: float = 5.0, garbage: bytes = b"\x00\xff 400\r\n") -> None:
        self.mode: Mode = "pass"
        self.injected = 0
        self.garbage = garbage
        self._server, self._delay = server, delay
        self._turn = itertools.count()
        self._closing = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._clients: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]

    def __enter__(self) -> FaultProxy:
        self._threads[0].start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._closing.set()
        for end in (self._listener, *self._clients):
            _shut(end)
        for thread in self._threads:
            thread.join(10)
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while not self._closing.is_set():
                client, _ = self._listener.accept()
                self._clients.append(client)
                self._threads.append(threading.Thread(target=self._serve, args=(client,)))
                self._threads[-1].start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._server) as server, suppress(OSError):
            answers = threading.Thread(target=_pump, args=(server, client))
            answers.start()
            try:
                while self.mode == "refuse" or (chunk := client.recv(1 << 16)):
                    if self._passes(client):
                        server.sendall(chunk)
            finally:
                _shut(server)
                answers.join(10)

    def _passes(self, client: socket.socket) -> bool:
        """Do what the mode says with one piece of a request; returns whether it goes on to the server."""
        if self.mode == "pass" or (self.mode == "flap" and next(self._turn) % 2):
            return True
        self.injected += 1
        if self.mode in ("refuse", "flap"):
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            raise ConnectionAbortedError
        if self.mode == "garbage":
            client.sendall(self.garbage)
        return self.mode == "slow" and not self._closing.wait(self._delay)


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while chunk := source.recv(1 << 16):
            sink.sendall(chunk)


def _shut(end: socket.socket) -> None:
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
