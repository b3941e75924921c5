"""What ends a session, on real servers: restarts, other processes, and while a stream runs."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.api.conftest import PASSWORD
from tests.api.server import ROOT, SECONDS, Server, eventually
from tests.api.test_generate import events

SILENT = {"prompt": "silent", "cache": False}


def status(server: Server, method: str, path: str, body: object = None) -> int:
    with closing(server.connect(method, path, body)) as connection:
        answer = connection.getresponse()
        answer.read()
        return answer.status


def login(server: Server, name: str) -> dict[str, str]:
    return server.ask("POST", "/login", {"username": name, "password": PASSWORD})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `alone` works in."""
    return tmp_path_factory.mktemp("alone")


@pytest.fixture(scope="module")
def alone(folder: Path) -> Iterator[Server]:
    with Server(folder, PASSWORD) as running:
        yield running


def by_http(server: Server, name: str, body: dict[str, Any]) -> Callable[[], object]:
    return lambda: server.ask("PATCH", f"/admin/users/{name}", body)


def by_command(server: Server, folder: Path, *words: str) -> Callable[[], object]:
    environ = {**os.environ, "DATA_DIR": str(folder / "data")}
    command = [sys.executable, "-m", "flask", "--app", "app", "users", *words]
    return lambda: subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, check=True, timeout=60)


@pytest.mark.promise(
    "P18",
    injected="disabled, demoted, deleted or a new password, by HTTP or command, while streams run",
    counted="within 3 s",
)
@pytest.mark.parametrize("act", ["disable", "role", "password", "delete", "command"])
def test_a_running_stream_is_cut_when_its_user_loses_the_right_to_it(
    alone: Server, folder: Path, counted: Callable[..., None], act: str
) -> None:
    name = f"bob-{act}"
    alone.ask("POST", "/admin/users", {"username": name, "password": PASSWORD})
    admin, bob = alone.token, login(alone, name)["access_token"]
    acts = {
        "disable": by_http(alone, name, {"disabled": True}),
        "role": by_http(alone, name, {"role": "admin"}),
        "password": by_http(alone, name, {"password": "another long password"}),
        "delete": lambda: status(alone, "DELETE", f"/admin/users/{name}"),
        "command": by_command(alone, folder, "disable", name),
    }
    with ExitStack() as open_streams:
        streams = [opened(open_streams, alone, SILENT, token) for token in (bob, bob, admin)]
        eventually(lambda: alone.open_streams() == 3)
        alone.token = admin
        acts[act]()
        done = time.monotonic()
        endings = [events(stream.read().decode())[-1] for stream in streams[:2]]
        assert time.monotonic() - done < 3
        cut = [(name, data["error"]["code"]) for name, data in endings]
        eventually(lambda: alone.open_streams() == 1, 5)
        counted(cut_streams=cut.count(("error", "invalid_token")), streams_of_others=alone.open_streams())
        assert cut == [("error", "invalid_token")] * 2
    eventually(lambda: alone.open_streams() == 0, 5)


def opened(held: ExitStack, server: Server, body: object, token: str) -> http.client.HTTPResponse:
    """A stream that has begun, or the refusal; hung up when `held` is left."""
    server.token = token
    connection = held.enter_context(closing(server.connect("POST", "/stream", body)))
    return held.enter_context(connection.getresponse())


@pytest.mark.promise(
    "P18", injected="kill -9, a cache filled and flushed, a restart", counted="access, refresh and API key"
)
def test_a_revoked_token_stays_revoked_through_kill_restart_and_a_lost_cache(
    tmp_path: Path, redis_url: str, counted: Callable[..., None]
) -> None:
    cache = redis.Redis.from_url(redis_url)
    with Server(tmp_path, PASSWORD, REDIS_URL=redis_url) as server:
        tokens = login(server, "admin")
        key = server.ask("POST", "/keys", {"name": "ci"})
        server.token, admin = tokens["access_token"], server.token
        assert status(server, "POST", "/logout") == 204
        server.token = admin
        assert status(server, "DELETE", f"/keys/{key['id']}") == 204
        os.killpg(server.process.pid, signal.SIGKILL)
        server.process.wait(SECONDS)
    cache.set("fill", b"x" * 1_000_000)
    cache.flushall()
    cache.close()
    with Server(tmp_path, PASSWORD, REDIS_URL=redis_url) as server:
        statuses = []
        for token in (tokens["access_token"], key["key"], admin):
            server.token = token
            statuses.append(status(server, "GET", "/v1/models"))
        server.token = tokens["refresh_token"]
        statuses.append(status(server, "POST", "/refresh"))
    counted(refused_tokens=statuses.count(401), good_tokens=statuses.count(200))
    assert statuses == [401, 401, 200, 401], "one that nobody revoked is good"


@pytest.fixture
def pair(tmp_path: Path, redis_url: str) -> Iterator[tuple[Server, Server]]:
    """Two processes with one data folder and one Redis."""
    with redis.Redis.from_url(redis_url) as counts:
        counts.flushall()
    shared = {"REDIS_URL": redis_url, "DATA_DIR": str(tmp_path / "data"), "USER_RPM": "120"}
    (tmp_path / "two").mkdir()
    with Server(tmp_path, PASSWORD, **shared) as one, Server(tmp_path / "two", PASSWORD, **shared) as two:
        one.ask("POST", "/admin/users", {"username": "bob", "password": PASSWORD})
        yield one, two


def at_once(pair: tuple[Server, Server], begin: Callable[[Server], int]) -> list[int]:
    with ThreadPoolExecutor(32) as pool:
        return sorted(pool.map(lambda number: begin(pair[number % 2]), range(64)))


def test_two_processes_share_rates_and_quotas_exactly_and_each_bounds_its_streams(pair: tuple[Server, Server]) -> None:
    one, two = pair
    one.ask("PATCH", "/admin/users/bob", {"limits": {"rpm": 100, "streams": 9, "tokens_per_day": 0}})
    admin = one.token
    one.token = two.token = bob = login(two, "bob")["access_token"]
    with ExitStack() as held:
        assert at_once(pair, lambda server: opened(held, server, SILENT, bob).status) == [200] * 18 + [429] * 46
    eventually(lambda: one.open_streams() + two.open_streams() == 0, 5)
    assert [status(pair[number % 2], "GET", "/v1/models") for number in range(38)] == [200] * 36 + [429] * 2

    one.token = admin
    limits = {"rpm": 1000, "streams": 100, "tokens_per_day": 7 * 111 + 110}
    one.ask("PATCH", "/admin/users/bob", {"limits": limits})
    one.token = two.token
    body = {**SILENT, "max_new_tokens": 100}  # beside "user:silent", 11 tokens to the script
    with ExitStack() as held:
        assert at_once(pair, lambda server: opened(held, server, body, bob).status) == [200] * 7 + [429] * 57
    eventually(lambda: one.open_streams() + two.open_streams() == 0, 5)
