"""Requests that wait for a model, a password or a tokenizer leave a thread, and the interpreter, to the others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from threading import Event

import pytest
from flask import Flask

from accounts.passwords import Passwords
from api.context import LOGINS, PREPARING, Capacity
from errors import Overloaded
from model.types import GenerateRequest
from tests.api.conftest import PASSWORD, Client
from tests.api.scripted import CONTEXT, ScriptedBackend
from tests.api.server import Server, eventually
from version import VERSION

SILENT = {"prompt": "silent", "temperature": 0}
LONG = {"prompt": "w" * 20_000, "cache": False}
ENORMOUS = {"prompt": "<b<b aN=1>>" * 90_000, "cache": False}


def test_a_place_is_free_again_whatever_happened_on_it() -> None:
    places = Capacity(1, retry_after=3)
    with pytest.raises(KeyError), places.take():
        raise KeyError
    with places.take(), pytest.raises(Overloaded) as refused, places.take():
        pass
    assert refused.value.retry_after == 3


def test_more_generations_than_there_are_threads_are_503_and_a_closed_one_makes_room(
    make_app: Callable[..., Flask], backend: ScriptedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.context.max_generations", lambda settings: 3)
    admin = Client(make_app()).login()
    running = [admin.post("/stream", SILENT) for _ in range(3)]
    refused = admin.post("/stream", SILENT)
    assert (refused.status_code, refused.json["error"]["code"]) == (503, "overloaded")
    assert (refused.headers["Retry-After"], len(backend.submitted)) == ("5", 3)
    running.pop().close()
    assert admin.post("/generate", {"prompt": "hi"}).status_code == 200
    for stream in running:
        stream.close()


@pytest.mark.promise("P8", injected="a megabyte of words, as HTML")
def test_a_prompt_that_cannot_fit_is_refused_by_its_length_alone(
    app: Flask, admin: Client, backend: ScriptedBackend, monkeypatch: pytest.MonkeyPatch, counted: Callable[..., None]
) -> None:
    worked: list[object] = []
    refusals = []
    monkeypatch.setattr(ScriptedBackend, "prepare", lambda _, request: worked.append(request))
    monkeypatch.setattr("api.generation._cleaned", worked.append)
    for path, param in (("/generate", "prompt"), ("/stream", "prompt")):
        refused = admin.post(path, ENORMOUS)
        refusals.append(refused.status_code)
        error = refused.json["error"]
        assert (refused.status_code, error["code"], error["param"]) == (422, "context_length_exceeded", param)
        assert "maximum context length" in error["message"] and str(CONTEXT * 16) in error["message"]
    counted(refused=refusals.count(422), prepared_texts=len(worked), generations=len(backend.submitted))
    assert worked == [] and backend.submitted == []


@pytest.mark.promise("P8", injected="8 long prompts at once", counted="a short one is served meanwhile")
def test_long_prompts_are_prepared_two_at_a_time_and_short_ones_do_not_wait(
    make_app: Callable[..., Flask], monkeypatch: pytest.MonkeyPatch, counted: Callable[..., None]
) -> None:
    admin = Client(make_app(user_streams=20)).login()
    working, most, go, prepare = [], [0], Event(), ScriptedBackend.prepare

    def slow(self: ScriptedBackend, request: GenerateRequest) -> GenerateRequest:
        if len(request.messages[0].content) == len(LONG["prompt"]):
            working.append(1)
            most[0] = max(most[0], len(working))
            go.wait(10)
            working.pop()
        return prepare(self, request)

    monkeypatch.setattr(ScriptedBackend, "prepare", slow)
    with ThreadPoolExecutor(8) as pool:
        long = [pool.submit(lambda: admin.post("/generate", LONG).status_code) for _ in range(8)]
        eventually(lambda: len(working) == PREPARING)
        assert admin.post("/generate", {"prompt": "hi"}).status_code == 200
        go.set()
        statuses = [each.result() for each in long]
    counted(long_prompts=statuses.count(200), prepared_at_once=most[0])
    assert statuses == [200] * 8 and most == [PREPARING]


def test_a_prompt_that_finds_no_place_in_its_time_is_503(
    make_app: Callable[..., Flask], monkeypatch: pytest.MonkeyPatch
) -> None:
    admin, working, go, prepare = Client(make_app(request_timeout=0.2)).login(), [], Event(), ScriptedBackend.prepare

    def slow(self: ScriptedBackend, request: GenerateRequest) -> GenerateRequest:
        working.append(1)
        go.wait(10)
        return prepare(self, request)

    monkeypatch.setattr(ScriptedBackend, "prepare", slow)
    with ThreadPoolExecutor(PREPARING) as pool:
        first = [pool.submit(lambda: admin.post("/generate", LONG).status_code) for _ in range(PREPARING)]
        eventually(lambda: len(working) == PREPARING)
        assert admin.post("/generate", LONG).status_code == 503
        go.set()
        assert [each.result() for each in first] == [200] * PREPARING


@pytest.mark.promise(
    "P2", injected="one client posting 1 MB bodies in a loop", counted="a text beside them takes under twice its time"
)
def test_a_client_that_posts_megabytes_does_not_stretch_anothers_stream(
    admin: Client, counted: Callable[..., None]
) -> None:
    def gaps() -> float:
        """The time that 40 words take whose script waits 50 ms between two."""
        started = time.monotonic()
        assert admin.post("/generate", {"prompt": "slow " + "word " * 39, "cache": False}).status_code == 200
        return time.monotonic() - started

    stop, posted = threading.Event(), []

    def flood() -> None:
        while not stop.is_set():
            posted.append(admin.post("/generate", ENORMOUS).status_code)

    alone, flooding = gaps(), threading.Thread(target=flood)
    flooding.start()
    try:
        beside = gaps()
    finally:
        stop.set()
        flooding.join()
    counted(refused_bodies=posted.count(422))
    assert beside < 2 * alone and len(posted) >= 3 and set(posted) == {422}


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


@pytest.mark.promise("P22", injected="logins with made-up names at once from one address", counted="from another")
def test_made_up_names_from_one_address_leave_places_for_others(
    nobody: Client, monkeypatch: pytest.MonkeyPatch, counted: Callable[..., None]
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
        another = login("admin", "192.0.2.2")
        go.set()
        statuses = sorted(each.result() for each in hostile)
    counted(let_in=int(another == 200), refused=statuses.count(401), shed=statuses.count(503))
    assert another == 200 and statuses == [401] * (LOGINS // 2) + [503] * (24 - LOGINS // 2)


@pytest.mark.promise("P8", injected="clients that wait for an answer", counted="health answers all the same")
def test_health_answers_while_everybody_else_waits(tmp_path: Path, counted: Callable[..., None]) -> None:
    few = {"SLOTS": "1", "MAX_QUEUE": "1", "USER_STREAMS": "1000"}
    with Server(tmp_path, PASSWORD, **few) as server, ExitStack() as waiting:
        clients = [waiting.enter_context(closing(server.connect("POST", "/generate", SILENT))) for _ in range(60)]
        eventually(lambda: server.open_streams() == 18)
        counted(clients=len(clients), generations=server.open_streams())
        assert server.ask("GET", "/healthz") == {"status": "ok", "version": VERSION}
