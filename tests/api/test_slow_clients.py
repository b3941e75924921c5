"""P9, P36: clients that send slowly, stop in the middle or never hang up, through nginx and straight to gunicorn."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.api.conftest import PASSWORD
from tests.api.server import SECONDS, FrontDoor, Server, eventually
from tests.api.test_engine_faults import POISONED, details
from tests.api.test_generate import events

FEW = {"SLOTS": "8", "MAX_QUEUE": "1", "TRUSTED_PROXIES": "1", "USER_STREAMS": "1000"}
HEADERS = b"POST /login HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
HALVES = {
    "nothing at all": b"",
    "half a head": b"GET /healthz HTTP/1.1\r\nHost: loc",
    "half a body": HEADERS + b'Content-Length: 40\r\n\r\n{"username": "ad',
    "half a chunk": HEADERS + b'Transfer-Encoding: chunked\r\n\r\n28\r\n{"username": "ad',
    "a body too large": HEADERS + b"Content-Length: 9999999999\r\n\r\n{",
}
LONG = {"prompt": "a story", "max_new_tokens": 2000, "cache": False}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("slow"), PASSWORD, **FEW) as running:
        yield running


@pytest.fixture
def door(server: Server, tmp_path: Path) -> Iterator[FrontDoor]:
    with FrontDoor(server, tmp_path) as front:
        yield front


def address(number: int) -> str:
    """One of 200 addresses of loopback: nginx gives each 128 connections."""
    return f"127.0.0.{number % 200 + 2}"


def ask(door: FrontDoor, body: dict[str, Any], source: str) -> Any:
    with closing(door.connect("POST", "/generate", body, source)) as connection:
        return json.loads(connection.getresponse().read())


def story(dial: Callable[[], socket.socket]) -> dict[str, Any]:
    """It outlasts 1,500 connections, at the speed of 50 of them now; a word takes 50 ms."""
    started = time.monotonic()
    for _ in range(50):
        dial().close()
    words = min(600, 40 + int(1.5 * 30 * (time.monotonic() - started) / 0.05))
    return {"prompt": "slow" + " w" * words, "max_new_tokens": words + 1, "cache": False}


def whole(told: list[list[tuple[str, Any]]], body: dict[str, Any]) -> int:
    """How many of these streams have every word of this story."""
    return sum(each[-1][0] == "done" and len(each) == body["max_new_tokens"] + 1 for each in told)


@pytest.mark.promise(
    "P36",
    injected="1,500 connections through nginx: silent, in half a head, half a body, abandoned",
    counted="the same process, its connections back to what they were",
)
def test_fifteen_hundred_slow_half_and_abandoned_connections_harm_nobody(
    server: Server, door: FrontDoor, counted: Callable[..., None]
) -> None:
    worker, clients = psutil.Process(details(server)["pid"]), []
    body = story(lambda: door.dial("127.0.3.1"))
    sent = [b"", HALVES["half a head"], HALVES["half a body"], None]
    with ExitStack() as held:
        streams = [
            held.enter_context(closing(door.connect("POST", "/stream", body, f"127.0.1.{n + 1}"))).getresponse()
            for n in range(4)
        ]
        eventually(lambda: server.open_streams() == 4)
        for number in range(1500):
            half = sent[number % 4]
            if half == b"":
                client: socket.socket = socket.create_connection(("127.0.0.1", door.port), 20, (address(number), 0))
            else:
                client = door.dial(address(number))
                client.sendall(half if half is not None else HEADERS + b"Content-Length: 4\r\n\r\n{}  ")
            clients.append(client)
            if half is None:
                client.close()
            else:
                held.enter_context(closing(client))
        assert server.open_streams() == 4, "the streams ended before all connections were there"
        good = {"prompt": "hi", "cache": False}
        served = [ask(door, good, f"127.0.2.{number + 1}")["response"] for number in range(20)]
        told = [events(stream.read().decode()) for stream in streams]
    counted(connections=len(clients), whole_streams=whole(told, body), served_beside_them=served.count("hi"))
    assert whole(told, body) == 4 and served == ["hi"] * 20
    assert details(server)["pid"] == worker.pid
    eventually(lambda: len(worker.net_connections("tcp")) <= 3)


@pytest.mark.promise(
    "P36",
    injected="1,500 connections straight to gunicorn: silent, in half a head, half a body, abandoned",
    counted="the same process, its connections back to what they were",
)
def test_fifteen_hundred_connections_straight_cut_no_stream(server: Server, counted: Callable[..., None]) -> None:
    worker, clients = psutil.Process(details(server)["pid"]), []
    body = story(lambda: socket.create_connection(("127.0.0.1", server.port), SECONDS))
    with ExitStack() as held:
        streams = [held.enter_context(closing(server.connect("POST", "/stream", body))).getresponse() for _ in range(4)]
        until = time.monotonic() + 0.05 * body["max_new_tokens"]
        for number in range(1500):
            client = held.enter_context(closing(socket.create_connection(("127.0.0.1", server.port), SECONDS)))
            clients.append(client)
            client.sendall((b"", HALVES["half a head"], HALVES["half a body"], b"")[number % 4])
            if number % 4 == 3:
                client.close()
        assert time.monotonic() < until, "the streams ended before all connections were there"
        told = [events(stream.read().decode()) for stream in streams]
    counted(connections=len(clients), whole_streams=whole(told, body))
    assert whole(told, body) == 4
    eventually(lambda: len(worker.net_connections("tcp")) <= 3)
    assert details(server)["pid"] == worker.pid


@pytest.mark.promise("P9", injected="clients that send a byte now and then", counted="within 20 s")
def test_requests_that_trickle_through_nginx_are_ended_and_hold_no_thread(
    server: Server, door: FrontDoor, counted: Callable[..., None]
) -> None:
    with ExitStack() as held:
        slow = [held.enter_context(closing(door.dial(address(number)))) for number in range(50)]
        for client in slow:
            client.sendall(HALVES["half a head"])
            client.settimeout(0.01)
        started, ended, served = time.monotonic(), set(), 0
        while len(ended) < len(slow):
            assert time.monotonic() - started < 20, "it was let trickle on"
            assert ask(door, {"prompt": "hi", "cache": False}, address(len(ended) + 60))["response"] == "hi"
            served += 1
            ended |= {client for client in slow if client not in ended and over(client)}
        assert time.monotonic() - started > 8, "ended before its time"
    counted(ended=len(ended), served_beside_them=served)


def over(client: socket.socket) -> bool:
    """Whether the connection is closed, after one more byte."""
    try:
        client.send(b"x")
        return client.recv(4096) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


@pytest.mark.promise("P9", injected="10 readers that stop reading, through nginx", counted="within 35 s")
def test_readers_that_stop_reading_behind_nginx_lose_their_slots(tmp_path: Path, counted: Callable[..., None]) -> None:
    """nginx takes what it and two kernels can hold, 200 KB, before the app can tell: longer texts end 30 s after."""
    settings = {"SLOTS": "12", "USER_STREAMS": "1000", "PACE": "0", "TRUSTED_PROXIES": "1"}
    (tmp_path / "door").mkdir()
    with (
        Server(tmp_path, PASSWORD, POISONED, **settings) as server,
        FrontDoor(server, tmp_path / "door") as door,
        ExitStack() as held,
    ):
        assert ask(door, {"prompt": "warm"}, "127.0.0.1")["finish_reason"]
        for number in range(10):
            held.enter_context(closing(door.connect("POST", "/stream", LONG, address(number))))
        eventually(lambda: details(server)["running"] == 10)
        started, readers, served = time.monotonic(), details(server)["running"], 0
        while details(server)["running"]:
            assert time.monotonic() - started < 35, "a reader that stopped keeps its slot"
            assert ask(door, {"prompt": "hi", "max_new_tokens": 3}, f"127.0.3.{int(time.monotonic()) % 250}")["id"]
            served += 1
            time.sleep(0.2)
        counted(readers=readers, slots_held=details(server)["running"], served_beside_them=served)


@pytest.mark.parametrize("sent", HALVES.values(), ids=HALVES)
def test_good_clients_are_served_beside_some_that_stop_straight_at_gunicorn(server: Server, sent: bytes) -> None:
    with ExitStack() as held:
        for _ in range(20):
            client = held.enter_context(closing(socket.create_connection(("127.0.0.1", server.port), SECONDS)))
            client.sendall(sent)
        for _ in range(20):
            assert server.ask("POST", "/generate", {"prompt": "hi", "cache": False})["response"] == "hi"


def test_a_body_that_stalls_is_408(server: Server) -> None:
    def stall(framing: bytes) -> tuple[int, str, bool]:
        started = time.monotonic()
        status, error = answer(server, HEADERS + framing + b'{"username": "ad')
        return status, error["code"], 8 < time.monotonic() - started < 15

    framings = (b"Content-Length: 40\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n28\r\n")
    with ThreadPoolExecutor() as pool:
        assert list(pool.map(stall, framings)) == [(408, "request_timeout", True)] * 2


def answer(server: Server, sent: bytes, whole: bool = False) -> tuple[int, dict[str, Any]]:
    """Status and error of what these bytes get; 0 for a connection that is closed without a word."""
    with closing(socket.create_connection(("127.0.0.1", server.port), SECONDS)) as client:
        try:
            client.sendall(sent)
            if whole:
                client.shutdown(socket.SHUT_WR)
            response = http.client.HTTPResponse(client)
            response.begin()
            return response.status, json.loads(response.read())["error"]
        except (OSError, http.client.BadStatusLine):
            return 0, {}


@pytest.mark.parametrize(
    ("sent", "statuses"),
    [
        (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 20_000, {431, 0}),
        (b"GET /" + b"a" * 10_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", {414, 0}),
        (HEADERS + b"Content-Length: 9999999999999999999999\r\n\r\n{", {413}),
        (HEADERS + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n{", {400, 413, 431}),
        (HEADERS + b"Transfer-Encoding: gzip, chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", {422}),
        (HEADERS + b"Transfer-Encoding: gzip\r\n\r\n", {400}),
        (HEADERS + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\na\r\n" * 400_000, {413, 0}),
        (HEADERS + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n" + b"A: b\r\n" * 400_000, {400, 431, 0}),
        (HEADERS + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 40_000 + b"\r\n", {400, 0}),
        (HEADERS + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n\r\n", {400}),
        (HEADERS + b"Content-Length: 40\r\n\r\n{", {400}),
    ],
    ids=lambda value: repr(value[-24:]) if isinstance(value, bytes) else "",  # an environment variable holds it
)
def test_what_can_never_become_a_request_is_refused_or_closed(server: Server, sent: bytes, statuses: set[int]) -> None:
    pid = details(server)["pid"]
    status, error = answer(server, sent, whole=True)
    assert status in statuses and (status == 0 or "message" in error), (status, error)
    assert details(server)["pid"] == pid and server.ask("GET", "/healthz")["status"] == "ok"


@pytest.mark.parametrize(("token", "status"), [("good", 200), ("bad", 401)])
def test_a_client_that_waits_for_100_continue_is_told_to_go_on_at_once(server: Server, token: str, status: int) -> None:
    bearer = server.token if token == "good" else "bad"
    body = b'{"prompt": "hi", "cache": false}'
    head = "POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nExpect: 100-continue\r\n"
    head += f"Authorization: Bearer {bearer}\r\nContent-Length: {len(body)}\r\n\r\n"
    with closing(socket.create_connection(("127.0.0.1", server.port), 5)) as client:
        client.sendall(head.encode())
        assert client.recv(25, socket.MSG_WAITALL) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(body)
        response = http.client.HTTPResponse(client)
        response.begin()
        assert response.status == status and response.read()


def test_a_request_in_single_bytes_is_served_when_it_is_whole(server: Server) -> None:
    body = b'{"username": "admin", "password": "nobody"}'
    for framed in (
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body),
        b"Transfer-Encoding: chunked\r\n\r\n%x;a=b\r\n%s\r\n0\r\nA: b\r\n\r\n" % (len(body), body),
    ):
        with closing(socket.create_connection(("127.0.0.1", server.port), SECONDS)) as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for byte in HEADERS + framed:
                client.send(bytes([byte]))
            assert client.recv(4096).split(b" ")[1] in (b"401", b"429")


def test_two_requests_in_one_piece_are_both_answered(server: Server) -> None:
    with closing(socket.create_connection(("127.0.0.1", server.port), SECONDS)) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n" * 2)
        seen = bytearray()
        eventually(lambda: seen.extend(client.recv(4096)) or seen.count(b"200 OK") == 2)


def test_clients_that_hang_up_in_the_middle_leave_nothing_behind(server: Server) -> None:
    worker = psutil.Process(details(server)["pid"])
    eventually(lambda: len(worker.net_connections("tcp")) <= 3)
    with ExitStack() as held:
        for _ in range(50):
            client = held.enter_context(closing(socket.create_connection(("127.0.0.1", server.port), SECONDS)))
            client.sendall(HALVES["half a body"])
        eventually(lambda: len(worker.net_connections("tcp")) >= 50)
    eventually(lambda: len(worker.net_connections("tcp")) <= 3)
