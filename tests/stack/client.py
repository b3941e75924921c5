"""A client of the stack: HTTPS against its own certificate, from any address of loopback.

Knows no retry and no redirect: tests want to see them.
"""

from __future__ import annotations

import http.client
import json
import ssl
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

from ops.stack import Stack

SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True, slots=True)
class Door:
    """nginx of a running stack, as its clients see it."""

    stack: Stack
    token: str | None = None

    def connect(self, address: str = "127.0.0.1", tls: ssl.TLSVersion | None = None) -> http.client.HTTPSConnection:
        """A new connection from this address of loopback; `tls` is the highest version it offers."""
        context = ssl.create_default_context(cafile=self.stack.secrets / "tls.crt")
        if tls:
            context.maximum_version = tls
        return http.client.HTTPSConnection(
            "localhost", self.stack.https, timeout=SECONDS, context=context, source_address=(address, 0)
        )

    @contextmanager
    def open(
        self,
        method: str,
        path: str,
        body: object = None,
        headers: Mapping[str, str] | None = None,
        address: str = "127.0.0.1",
    ) -> Iterator[http.client.HTTPResponse]:
        """Sends one request; inside, its answer can be read, and leaving hangs up. A body is bytes, a list of bytes
        (sent in chunks), or anything else as JSON.
        """
        with closing(self.connect(address)) as connection:
            given = {"Content-Type": "application/json", **(headers or {})}
            if self.token:
                given["Authorization"] = f"Bearer {self.token}"
            raw = body if body is None or isinstance(body, bytes | list) else json.dumps(body)
            connection.request(method, path, raw, given)
            with connection.getresponse() as response:
                yield response

    def ask(
        self,
        method: str,
        path: str,
        body: object = None,
        headers: Mapping[str, str] | None = None,
        address: str = "127.0.0.1",
    ) -> Answer:
        """Sends one request and reads the whole answer."""
        with self.open(method, path, body, headers, address) as response:
            return Answer(response.status, response.headers, response.read())

    def login(self, password: str) -> Door:
        """The same client, signed in as admin."""
        answer = self.ask("POST", "/login", {"username": "admin", "password": password})
        assert answer.status == 200, answer.body
        return Door(self.stack, answer.json["access_token"])

    def metric(self, name: str) -> float:
        """One sample of /metrics, by its name with labels; 0 before its first event."""
        lines = (line.rpartition(" ") for line in self.direct("/metrics").body.decode().splitlines())
        return next((float(value) for sample, _, value in lines if sample == name), 0.0)

    def direct(self, path: str) -> Answer:
        """GET from the app itself, past nginx."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.stack.app, timeout=SECONDS)) as connection:
            connection.request("GET", path)
            with connection.getresponse() as response:
                return Answer(response.status, response.headers, response.read())


def until(condition: Callable[[], object], seconds: float = SECONDS) -> None:
    """Returns as soon as the condition holds; fails the test when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.01)


def events(response: Iterable[bytes]) -> Iterable[tuple[str, Any]]:
    """The server-sent events of a response as (event name, decoded data), each as soon as it is there."""
    name = "message"
    for line in response:
        if line.startswith(b"event: "):
            name = line[7:].decode().strip()
        elif line.startswith(b"data: "):
            yield name, json.loads(line[6:])
            name = "message"
