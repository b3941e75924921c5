"""P9: who sends slowly, stops in the middle or does not hang up holds no thread, and is shown the door in time."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing

import pytest
from api.arrival import HEAD, Arrival, TooLong

from tests.api.conftest import PASSWORD
from tests.api.server import SECONDS, Server, eventually

FEW = {"SLOTS": "1", "MAX_QUEUE": "1"}  # 50 threads, so that 120 clients would hold them all
HEADERS = "POST /login HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
SLOW: dict[str, bytes] = {
    "nothing at all": b"",
    "half a head": b"GET /healthz HTTP/1.1\r\nHost: loc",
    "half a body": HEADERS.encode() + b'Content-Length: 40\r\n\r\n{"username": "ad',
    "half a chunk": HEADERS.encode() + b'Transfer-Encoding: chunked\r\n\r\n28\r\n{"username": "ad',
    "chunks without an end": HEADERS.encode() + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n",
    "a body too large": HEADERS.encode() + b"Content-Length: 9999999999\r\n\r\n{",
    "no HTTP, and no hanging up": b"\x16\x03\x01\x02\x00 hello\r\n\r\n",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("slow"), PASSWORD, **FEW) as running:
        yield running


def clients(server: Server, count: int, sent: bytes, held: ExitStack) -> list[socket.socket]:
    """So many connections, from addresses of their own, that have sent this and wait."""
    opened = []
    for number in range(count):
        address = f"127.0.0.{number % 200 + 2}"
        opened.append(
            held.enter_context(closing(socket.create_connection(("127.0.0.1", server.port), SECONDS, (address, 0))))
        )
        opened[-1].sendall(sent)
    return opened


@pytest.mark.promise(
    "P9", injected="120 clients that stop in the middle, each way", counted="20 good ones served in 2 s"
)
@pytest.mark.parametrize("sent", SLOW.values(), ids=SLOW)
def test_good_clients_are_served_beside_120_that_stop_in_the_middle(server: Server, sent: bytes) -> None:
    with ExitStack() as held:
        slow = clients(server, 120, sent, held)
        started = time.monotonic()
        for _ in range(20):
            assert server.ask("POST", "/generate", {"prompt": "hi", "cache": False})["response"] == "hi"
        assert time.monotonic() - started < 2
        assert len(slow) == 120


@pytest.mark.promise(
    "P9", injected="50 clients that send a byte now and then", counted="all shown the door in 13 s, by 408"
)
def test_a_request_that_trickles_is_ended_in_time(server: Server) -> None:
    with ExitStack() as held:
        slow = clients(server, 50, SLOW["half a body"], held)
        started = time.monotonic()
        answered: dict[socket.socket, bytes] = {}
        while len(answered) < len(slow):
            assert time.monotonic() - started < 13, "it was let trickle on"
            for client in slow:
                if client not in answered:
                    trickle(client, answered)
    assert all(answer.startswith(b"HTTP/1.1 408 Request Timeout") for answer in answered.values())
    assert time.monotonic() - started > 9, "ended before its time"
    head, _, body = answered[slow[0]].partition(b"\r\n\r\n")
    assert b"Connection: close" in head and json.loads(body)["error"]["code"] == "request_timeout"


def trickle(client: socket.socket, answered: dict[socket.socket, bytes]) -> None:
    """One more byte, and a look whether there is an answer."""
    client.settimeout(0.01)
    try:
        client.send(b" ")
        if answer := client.recv(4096):
            answered[client] = answer
    except TimeoutError:
        return


def test_a_request_in_single_bytes_is_served_when_it_is_whole(server: Server) -> None:
    body = b'{"username": "admin", "password": "nobody"}'
    for framed in (
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body),
        b"Transfer-Encoding: chunked\r\n\r\n%x;a=b\r\n%s\r\n0\r\nA: b\r\n\r\n" % (len(body), body),
    ):
        with closing(socket.create_connection(("127.0.0.1", server.port), SECONDS)) as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for byte in HEADERS.encode() + framed:
                client.send(bytes([byte]))
            assert client.recv(4096).split(b" ")[1] in (b"401", b"429")


def test_two_requests_in_one_piece_are_both_answered(server: Server) -> None:
    with closing(socket.create_connection(("127.0.0.1", server.port), SECONDS)) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n" * 2)
        seen = bytearray()
        eventually(lambda: seen.extend(client.recv(4096)) or seen.count(b"200 OK") == 2)


def test_whoever_hangs_up_in_the_middle_leaves_nothing_behind(server: Server) -> None:
    with ExitStack() as held:
        clients(server, 50, SLOW["half a body"], held)
    assert server.ask("GET", "/healthz") == {"status": "ok"}


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 20_000, 431),
        (b"GET /" + b"a" * 10_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 414),
        (HEADERS.encode() + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\na\r\n" * 400_000, 413),
        (HEADERS.encode() + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n\r\n", 400),
        (HEADERS.encode() + b"Transfer-Encoding: gzip\r\n\r\n", 400),
        (HEADERS.encode() + b"Content-Length: 40\r\n\r\n{", 400),
    ],
)
def test_what_can_never_become_a_request_is_refused_in_our_own_shape(server: Server, sent: bytes, status: int) -> None:
    with closing(socket.create_connection(("127.0.0.1", server.port), SECONDS)) as client:
        try:
            client.sendall(sent)
            client.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it was refused before all was sent
        answer = bytearray()
        while more := client.recv(4096):
            answer += more
    head, _, body = bytes(answer).partition(b"\r\n\r\n")
    assert int(head.split(b" ")[1]) == status and "message" in json.loads(body)["error"], answer


def pieces(whole: bytes, most: int = 100) -> Callable[[int], tuple[bool, bool]]:
    """What an Arrival says of a request cut at a place: whether it waits no more before, and after."""

    def cut(at: int) -> tuple[bool, bool]:
        arrival = Arrival(most)
        return arrival.add(whole[:at]), arrival.add(whole[at:])

    return cut


@pytest.mark.parametrize(
    "body",
    [
        b"Content-Length: 5\r\n\r\nhello",
        b"content-length:5\r\n\r\nhello",
        b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n3;a=b\r\nabc\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n0\r\nTrailer: x\r\n\r\n",
        b"A: b\r\n\r\n",
        b"Transfer-Encoding: gzip\r\nContent-Length: 5\r\n\r\n",
    ],
)
def test_a_request_is_whole_at_its_last_byte_and_not_before(body: bytes) -> None:
    whole = b"POST / HTTP/1.1\r\nHost: x\r\n" + body
    assert {pieces(whole)(at) for at in range(len(whole))} == {(False, True)}


def test_a_head_without_an_end_is_too_long() -> None:
    arrival = Arrival(100)
    with pytest.raises(TooLong):
        for _ in range(HEAD):
            arrival.add(b"ab")


def test_a_long_body_on_a_slow_line_has_its_time() -> None:
    arrival = Arrival(1 << 20, b"POST / HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n")
    assert arrival.overdue(10.1) and not arrival.overdue(9.9)
    arrival.add(b"a" * 500_000)
    assert not arrival.overdue(40) and arrival.overdue(45)
