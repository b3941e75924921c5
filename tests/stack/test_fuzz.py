"""P1: two thousand bodies that nobody would send, to a real gunicorn with a real, tiny model."""

from __future__ import annotations

import http.client
import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing

import psutil
import pytest

from tests.api.server import SECONDS, Server
from tests.model.tiny import tiny_checkpoint
from tests.stack.conftest import PASSWORD
from tests.stack.fuzz import bodies

CANARY = {"prompt": "why is the sky blue?", "max_new_tokens": 4, "temperature": 0, "cache": False}
SEED, COUNT, EVERY = 20261122, 2000, 50
SOON = 2.0  # seconds


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("fuzz")
    model = str(tiny_checkpoint(folder / "tiny"))
    own = {
        "MODEL": model,
        "MODELS_ALLOWED": model,
        "COMPILE": "off",
        "SLOTS": "4",
        "USER_RPM": "1000000",
        "THREADS": "1",
    }
    with Server(folder, PASSWORD, "app:create_app()", **own) as running:
        running.ask("POST", "/generate", CANARY)  # loads
        yield running


def sent(server: Server, connection: http.client.HTTPConnection, path: str, body: bytes) -> tuple[int, float]:
    """The status that a body gets, and the seconds until the end of its answer."""
    headers = {"Authorization": f"Bearer {server.token}", "Content-Type": "application/json"}
    started = time.monotonic()
    connection.request("POST", path, body, headers)
    with connection.getresponse() as response:
        response.read()
        return response.status, time.monotonic() - started


def worker(server: Server) -> int:
    """The process that serves."""
    (child,) = [each.pid for each in psutil.Process(server.process.pid).children()]
    return child


@pytest.mark.timeout(300)
@pytest.mark.promise(
    "P1", injected="2,000 seeded bodies, a canary every 50", counted="no 5xx, each < 2 s, one process, one text"
)
def test_two_thousand_odd_bodies_are_refused_or_served_and_nothing_else(server: Server) -> None:
    good, process, counted, slowest = (
        server.ask("POST", "/generate", CANARY)["response"],
        worker(server),
        Counter[int](),
        0.0,
    )
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=SECONDS)) as connection:
        for number, (path, body) in enumerate(bodies(SEED, COUNT)):
            status, seconds = sent(server, connection, path, body)
            assert status < 500 and seconds < SOON, (number, path, body[:200], status, seconds)
            counted[status] += 1
            slowest = max(slowest, seconds)
            if number % EVERY == 0:
                assert server.ask("POST", "/generate", CANARY)["response"] == good, number
    assert worker(server) == process and server.ask("POST", "/generate", CANARY)["response"] == good
    assert set(counted) <= {200, 400, 404, 422} and min(counted[200], counted[400], counted[422]) >= 100, counted
    assert json.dumps(good)
