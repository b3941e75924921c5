"""However many wait for a model or a password, a thread is left for everybody else."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from threading import Event

import pytest
from flask import Flask

from accounts.passwords import Passwords
from api.places import LOGINS, Places
from errors import Overloaded
from tests.api.conftest import PASSWORD, Client
from tests.api.scripted import ScriptedBackend
from tests.api.server import Server, eventually

TWIN = {"prompt": "silent", "temperature": 0}  # twins share one generation: neither a slot nor the queue counts them


def test_a_place_is_free_again_whatever_happened_on_it() -> None:
    places = Places(1, retry_after=3)
    with pytest.raises(KeyError), places.take():
        raise KeyError
    with places.take(), pytest.raises(Overloaded) as refused, places.take():
        pass
    assert refused.value.retry_after == 3


def test_more_twins_than_there_are_places_are_503_and_a_closed_one_makes_room(
    make_app: Callable[..., Flask], backend: ScriptedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.places._SHARING", 1)
    admin = Client(make_app(slots=1, max_queue=1)).login()
    running = [admin.post("/stream", TWIN) for _ in range(3)]
    refused = admin.post("/stream", TWIN)
    assert (refused.status_code, refused.json["error"]["code"]) == (503, "overloaded")
    assert (refused.headers["Retry-After"], len(backend.submitted)) == ("5", 1)
    running.pop().close()
    assert admin.post("/generate", {"prompt": "hi"}).status_code == 200
    for stream in running:
        stream.close()


def test_more_logins_than_may_wait_are_503_and_count_as_no_guess(
    nobody: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting, go = [], Event()

    def slow(*_: object) -> bool:
        waiting.append(1)
        return go.wait(10)

    monkeypatch.setattr("accounts.passwords.Passwords.verify", slow)

    def login(number: int, name: str = "admin") -> int:
        address = {"REMOTE_ADDR": f"192.0.2.{number}"}
        return nobody.post("/login", {"username": name, "password": PASSWORD}, environ_base=address).status_code

    with ThreadPoolExecutor(LOGINS) as pool:
        first = pool.map(lambda number: login(number, f"name{number}"), range(LOGINS))
        eventually(lambda: len(waiting) == LOGINS)
        assert [login(99) for _ in range(9)] == [503] * 9
        go.set()
        assert set(first) == {401}
    assert login(99) == 200


@pytest.mark.promise(
    "P22", injected="24 logins with made-up names at once from one address", counted="200 from another"
)
def test_made_up_names_from_one_address_leave_places_for_others(
    nobody: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting, go = [], Event()
    verify = Passwords.verify

    def slow(self: Passwords, stored: str | None, password: str) -> bool:
        if stored is None:
            waiting.append(1)
            go.wait(10)
        return verify(self, stored, password)

    monkeypatch.setattr(Passwords, "verify", slow)

    def login(name: str, address: str) -> int:
        body = {"username": name, "password": PASSWORD}
        return nobody.post("/login", body, environ_base={"REMOTE_ADDR": address}).status_code

    with ThreadPoolExecutor(24) as pool:
        hostile = [pool.submit(login, f"name{number}", "192.0.2.1") for number in range(24)]
        eventually(lambda: len(waiting) == LOGINS // 2)
        assert login("admin", "192.0.2.2") == 200
        go.set()
        statuses = sorted(each.result() for each in hostile)
    assert statuses == [401] * (LOGINS // 2) + [503] * (24 - LOGINS // 2)


@pytest.mark.promise("P8", injected="60 clients that wait for one answer", counted="health still answers")
def test_health_answers_while_everybody_else_waits(tmp_path: Path) -> None:
    few = {"SLOTS": "1", "MAX_QUEUE": "1", "USER_STREAMS": "1000"}
    with Server(tmp_path, PASSWORD, **few) as server, ExitStack() as waiting:
        for _ in range(60):
            waiting.enter_context(closing(server.connect("POST", "/generate", TWIN)))
        assert server.ask("GET", "/healthz") == {"status": "ok"}
        assert server.open_streams() == 1
