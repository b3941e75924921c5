"""P8 to P11 and P20: many at once, many that leave, and what the service is like afterwards."""

from __future__ import annotations

import http.client
import json
import random
import signal
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.api.conftest import PASSWORD
from tests.api.scripted import MODEL
from tests.api.server import SECONDS, Server, eventually
from tests.api.test_engine_faults import POISONED, details
from tests.api.test_generate import events
from tests.api.test_gunicorn import reading

CANCELLED = 'llm_requests_finished_total{reason="cancelled"}'
ENDLESS = {"prompt": "for ever", "max_new_tokens": 1_000_000, "cache": False}


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts a server whose engine has loaded: before that, it takes no text as long as these tests want."""
    with ExitStack() as held:

        def start(**settings: str) -> Server:
            usual = {"SLOTS": "4", "USER_STREAMS": "1000", "PACE": "0.005"}
            server = held.enter_context(Server(tmp_path, PASSWORD, POISONED, **usual | settings))
            assert status_of(server, {"prompt": "warm"})[0] == 200
            return server

        yield start


def status_of(server: Server, body: dict[str, Any]) -> tuple[int, str | None]:
    """Status and Retry-After."""
    with closing(server.connect("POST", "/generate", body)) as connection, connection.getresponse() as response:
        response.read()
        return response.status, response.headers["Retry-After"]


@pytest.mark.promise(
    "P8", injected="50 clients on 4 slots and a queue of 16", counted="under 100 MB more memory, normal within 10 s"
)
def test_overload_is_shed_and_leaves_nothing(serve: Callable[..., Server], counted: Callable[..., None]) -> None:
    server = serve(MAX_QUEUE="16")
    worker = psutil.Process(details(server)["pid"])
    memory = worker.memory_info().rss
    with ThreadPoolExecutor(50) as pool:
        asked = [
            pool.submit(status_of, server, {"prompt": f"n {n}", "max_new_tokens": 100, "cache": False})
            for n in range(50)
        ]
        seen = [details(server) for _ in range(20)]
        answers = [each.result() for each in asked]
    statuses = Counter(status for status, _ in answers)
    waits = [int(after or 0) for status, after in answers if status == 503]
    counted(served=statuses[200], shed=statuses[503], without_retry_after=waits.count(0))
    assert set(statuses) == {200, 503} and statuses[200] >= 20, statuses
    assert min(waits) >= 1
    # Four of those who wait may be on their way to a slot.
    assert max(each["running"] for each in seen) <= 4 and max(each["waiting"] for each in seen) <= 16 + 4
    assert worker.memory_info().rss - memory < 100 << 20
    assert status_of(server, {"prompt": "after"})[0] == 200
    eventually(lambda: (details(server)["running"], details(server)["waiting"]) == (0, 0), 10)


def deaf_reader(server: Server) -> socket.socket:
    """A client that asks for an endless stream, in long frames, and never reads it."""
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "for ever"}], "max_tokens": 1_000_000}
    body = json.dumps({**chat, "stream": True})
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", server.port))
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Authorization: Bearer {server.token}\r\nContent-Length: {len(body)}\r\n\r\n"
    client.sendall((head + body).encode())
    return client


@pytest.mark.promise("P9", injected="10 readers that stop reading", counted="within 35 s")
def test_readers_that_stop_reading_lose_their_slots(serve: Callable[..., Server], counted: Callable[..., None]) -> None:
    server = serve(SLOTS="12", PACE="0")
    with ExitStack() as held:
        for _ in range(10):
            held.enter_context(closing(deaf_reader(server)))
        eventually(lambda: details(server).get("running") == 10)
        beside = status_of(server, {"prompt": "hi"})[0]
        eventually(lambda: details(server)["running"] == 0, 35)
    cancelled = int(server.metric(CANCELLED))
    counted(cancelled=cancelled, served_beside_them=int(beside == 200), slots_held=details(server)["running"])
    assert (cancelled, beside) == (10, 200)


def hang_up(connection: http.client.HTTPConnection) -> None:
    """As a process that is killed does: with a reset."""
    assert connection.sock is not None
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.mark.promise("P10", injected="20 streams dropped at token 3, 20 calls, 20 in the queue", counted="each in 2 s")
def test_sixty_gone_clients_free_everything(serve: Callable[..., Server], counted: Callable[..., None]) -> None:
    server = serve(MAX_QUEUE="64")
    for expected in (20, 40):
        for _ in range(5):
            four = [server.connect("POST", "/stream" if expected == 20 else "/generate", ENDLESS) for _ in range(4)]
            for connection in four if expected == 20 else ():
                response = connection.getresponse()
                assert sum(response.readline().startswith(b"data") for _ in range(9)) >= 2
            eventually(lambda: details(server)["running"] == 4)
            for connection in four:
                hang_up(connection)
            gone = time.monotonic()
            eventually(lambda: details(server)["running"] == 0)
            assert time.monotonic() - gone < 2
        assert server.metric(CANCELLED) == expected
    with ExitStack() as held:
        for _ in range(4):
            held.enter_context(reading(server, ENDLESS))
        queued = [server.connect("POST", "/stream", ENDLESS) for _ in range(20)]
        eventually(lambda: details(server)["waiting"] == 20)
        for connection in queued:
            hang_up(connection)
        eventually(lambda: details(server)["waiting"] == 0)
        running, cancelled = details(server)["running"], int(server.metric(CANCELLED))
        assert (running, cancelled) == (4, 60)
    eventually(lambda: details(server)["running"] == 0)
    counted(cancelled=cancelled, slots_held=details(server)["running"])


@pytest.mark.promise("P11", injected="SIGTERM in the middle of 8 streams", counted="not ready at once, exit 0 in time")
def test_sigterm_in_the_middle_of_eight_streams(serve: Callable[..., Server], counted: Callable[..., None]) -> None:
    server = serve(SLOTS="8", GRACE_PERIOD="3", PACE="0.02")
    short, long = {"prompt": "short", "max_new_tokens": 40, "cache": False}, ENDLESS
    with ExitStack() as held:
        streams = [held.enter_context(reading(server, body)) for body in [short, long] * 4]
        server.process.send_signal(signal.SIGTERM)
        told = time.monotonic()
        eventually(lambda: not server.ask("GET", "/readyz")["ready"], 2)
        endings = [events(stream.read().decode())[-1] for stream in streams]
        names = Counter(name for name, _ in endings)
        counted(done_events=names["done"], error_events=names["error"])
        assert names == {"done": 4, "error": 4}
        assert {data["error"]["code"] for name, data in endings if name == "error"} == {"stopping"}
        assert server.process.wait(SECONDS) == 0
    assert time.monotonic() - told < 3 + 8


@pytest.mark.promise("P20", injected="requests of two users, 30 % of them hung up on")
def test_five_hundred_requests_never_get_anothers_words(tmp_path: Path, counted: Callable[..., None]) -> None:
    with Server(tmp_path, PASSWORD, USER_STREAMS="1000") as server:
        users = [server.as_user(name) for name in ("ann", "bob")]
        plan = random.Random(20).sample([(n, n % 10 < 3) for n in range(500)], 500)

        def ask(number: int, leaves: bool) -> bool:
            nonce, user = f"nonce-{number}", users[number % 2]
            prompt = f"slow {nonce} " + "word " * 40 if leaves else f"{nonce} and {nonce}"
            with closing(user.connect("POST", "/stream", {"prompt": prompt, "seed": number % 7})) as connection:
                if leaves:
                    connection.getresponse().readline()
                    return True
                said = [
                    data["text"] for name, data in events(connection.getresponse().read().decode()) if name == "message"
                ]
            return "".join(said) == prompt

        with ThreadPoolExecutor(16) as pool:
            right = list(pool.map(lambda each: ask(*each), plan))
        eventually(lambda: server.open_streams() == 0)
        counted(requests=len(right), mixed_replies=right.count(False), open_streams=server.open_streams())
        assert right == [True] * 500


@pytest.mark.promise("P18", injected="kill -9 of the whole service, its cache deleted")
def test_a_revoked_token_stays_revoked_after_kill_9(tmp_path: Path, counted: Callable[..., None]) -> None:
    with Server(tmp_path, PASSWORD) as server:
        good = server.token
        with server:
            revoked = server.token
            with closing(server.connect("POST", "/logout")) as connection:
                assert connection.getresponse().status == 204
    for cache in (tmp_path / "data").glob("cache.sqlite3*"):
        cache.unlink()
    with Server(tmp_path, PASSWORD) as server:
        statuses = []
        for server.token in (revoked, good):
            with closing(server.connect("GET", "/keys")) as connection:
                statuses.append(connection.getresponse().status)
    counted(refused_tokens=statuses.count(401), good_tokens=statuses.count(200))
    assert statuses == [401, 200]
