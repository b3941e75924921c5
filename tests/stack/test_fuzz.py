"""P1: two thousand malformed and odd bodies, sent to a real gunicorn with a real, tiny model."""

from __future__ import annotations

import http.client
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing

import psutil
import pytest

from ops.stack import ROOT
from tests.api.server import SECONDS, Server, eventually
from tests.model.tiny import tiny_checkpoint
from tests.stack.conftest import LOADING, PASSWORD, with_model
from tests.stack.fuzz import bodies

CANARY = {"prompt": "why is the sky blue?", "max_new_tokens": 4, "temperature": 0, "cache": False}
SEED, COUNT, EVERY = 20261122, 2000, 50
SOON = 2.0  # seconds
REFUSED = (400, 404, 422)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("fuzz")
    model = str(tiny_checkpoint(folder / "tiny"))
    with_model(ROOT / "data", folder / "data", "compiled")  # building the kernels anew took longer than the test
    own = {
        "MODEL": model,
        "MODELS_ALLOWED": model,
        "COMPILE": "off",
        "SLOTS": "4",
        "USER_RPM": "1000000",
        "THREADS": "1",
        "PRELOAD": "true",
    }
    with Server(folder, PASSWORD, "app:create_app()", **own) as running:
        eventually(lambda: running.ask("GET", "/readyz")["ready"], 2 * LOADING)
        yield running


def sent(server: Server, connection: http.client.HTTPConnection, path: str, body: bytes) -> tuple[int, float]:
    """The status that a body gets, and the seconds until the end of its answer. A ticket is used: 16 may wait."""
    headers = {"Authorization": f"Bearer {server.token}", "Content-Type": "application/json"}
    started = time.monotonic()
    connection.request("POST", path, body, headers)
    with connection.getresponse() as response:
        status, answer, seconds = response.status, response.read(), time.monotonic() - started
    if path == "/stream/ticket" and status == 200:
        connection.request("GET", f"/stream?ticket={json.loads(answer)['ticket']}")
        with connection.getresponse() as response:
            assert response.status == 200 or response.status in REFUSED, response.read()
            response.read()
    return status, seconds


def worker(server: Server) -> int:
    """The process that serves."""
    (child,) = [each.pid for each in psutil.Process(server.process.pid).children()]
    return child


@pytest.mark.timeout(300)
@pytest.mark.promise(
    "P1", injected="seeded bodies, a canary every 50", counted="each in 2 s, one process, the canary's text unchanged"
)
def test_two_thousand_odd_bodies_are_refused_or_served_and_nothing_else(
    server: Server, counted: Callable[..., None]
) -> None:
    good, process = server.ask("POST", "/generate", CANARY)["response"], worker(server)
    statuses, failed, canaries = Counter[int](), [], Counter[str]()
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=SECONDS)) as connection:
        for number, (path, body) in enumerate(bodies(SEED, COUNT)):
            status, seconds = sent(server, connection, path, body)
            statuses[status] += 1
            if status >= 500 or seconds > SOON:
                failed.append((number, path, body[:200], status, seconds))
            if number % EVERY == 0:
                canaries[server.ask("POST", "/generate", CANARY)["response"]] += 1
    server_errors = sum(count for status, count in statuses.items() if status >= 500)
    counted(bodies=statuses.total(), served=statuses[200], server_errors=server_errors, canaries=canaries[good])
    assert failed == [] and statuses.total() == COUNT
    assert set(statuses) <= {200, *REFUSED} and min(statuses[200], statuses[400], statuses[422]) >= 100, statuses
    assert canaries == {good: COUNT // EVERY} and worker(server) == process
