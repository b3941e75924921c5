"""kill -9 at any moment: whatever a client has seen is on record."""

from __future__ import annotations

import http.client
import itertools
import json
import multiprocessing
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from tests.api.conftest import PASSWORD
from tests.api.crashing import Remains, serve

CLIENTS = 4
BODIES = (
    ("/generate", {"prompt": "the same each time", "temperature": 0}),
    ("/stream", {"prompt": "the same each time", "temperature": 0}),
    ("/stream", {"prompt": "slow one two three four five six seven eight"}),
    ("/generate", {"prompt": "slow one two"}),
)
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.api.crashing"])  # a second of imports, once


class Clients:
    """Callers that go on until their server is gone, and note every request of which they saw a byte."""

    def __init__(self, port: int, numbers: Iterator[int]) -> None:
        self.seen: list[str] = []
        self._port, self._numbers = port, numbers
        self._token = self._login()
        self._threads = [threading.Thread(target=self._go_on, args=(n,)) for n in range(CLIENTS)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(20)
            assert not thread.is_alive()

    def _login(self) -> str:
        with closing(self._asked("/login", {"username": "admin", "password": PASSWORD}, {})) as connection:
            return str(json.loads(connection.getresponse().read())["access_token"])

    def _go_on(self, seed: int) -> None:
        with suppress(OSError, http.client.HTTPException):
            for route, body in itertools.islice(itertools.cycle(BODIES), seed, None):
                id = f"r{next(self._numbers)}"
                headers = {"Authorization": f"Bearer {self._token}", "X-Request-Id": id}
                with closing(self._asked(route, body, headers)) as connection:
                    answer = connection.getresponse()
                    if answer.read(1) and answer.status == 200:
                        self.seen.append(id)
                    answer.read()

    def _asked(self, route: str, body: object, headers: dict[str, str]) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=15)
        connection.request("POST", route, json.dumps(body), {"Content-Type": "application/json", **headers})
        return connection


@pytest.mark.promise("P12", injected="kill -9 at random moments under 4 clients")
def test_whatever_a_client_saw_is_on_record_after_fifty_kills(tmp_path: Path, counted: Callable[..., None]) -> None:
    chance, numbers, seen, exits = random.Random(12), itertools.count(), [], Counter[int | None]()
    for _ in range(50):
        here, there = PROCESSES.Pipe()
        process = PROCESSES.Process(target=serve, args=(tmp_path, PASSWORD, there), daemon=True)
        process.start()
        clients = Clients(here.recv(), numbers)
        clients.start()
        process.join(chance.uniform(0.02, 0.3))  # it does not end by itself
        process.kill()
        process.join(10)
        exits[process.exitcode] += 1
        clients.join()
        seen += clients.seen
    left = Remains(tmp_path)
    aborted = list(left.outcomes.values()).count("aborted")
    counted(
        kills=exits[-9],
        replies_seen=len(seen),
        replies_without_a_start=len(set(seen) - set(left.starts)),
        aborted=aborted,
        left_open=len(set(left.starts.values()) - set(left.outcomes)),
        faults_in_the_chain=len(left.report.problems),
    )
    assert exits == {-9: 50} and len(seen) > 100 and set(seen) <= set(left.starts)
    assert set(left.starts.values()) == set(left.outcomes), "what was open is closed"
    assert aborted >= 10
    assert left.report.problems == [] and left.report.last == left.report.records
