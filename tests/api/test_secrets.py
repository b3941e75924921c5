"""No password, token, key, ticket or prompt is in anything that a service with a full day's work has written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.api.corpus import send
from tests.api.server import Server, eventually
from tests.leaks import TOKEN, written

PASSWORD, CANARY = "correct horse battery 7f3a", "canary-9c41e7"
JSON = {"path": "/generate", "json": {}}


def work(server: Server) -> Iterator[str]:
    """A day's work; yields the secrets that it was given, and asks with each of them."""
    yield PASSWORD
    yield server.token
    for prompt in ("", "slow ", "think ", "fail ", "break a b c ", "bug a b c "):
        for path in ("/generate", "/stream", "/v1/chat/completions"):
            said = {"messages": [{"role": "user", "content": prompt + CANARY}], "temperature": 0}
            send(
                server,
                {"path": path, "json": said | ({"model": "smollm2-135m-instruct"} if "v1" in path else {})},
                server.token,
            )
    ticket = server.ask("POST", "/stream/ticket", {"prompt": CANARY})["ticket"]
    yield ticket
    key = server.ask("POST", "/keys", {"name": "app"})["key"]
    yield key
    for token in (key, ticket, server.token[:-2], "a.b.c"):
        send(server, JSON | {"json": {"prompt": CANARY, "temperature": CANARY}}, token)
        send(server, {"method": "GET", "path": f"/stream?ticket={token}"}, token)
    yield str(server.ask("POST", "/admin/users", {"username": "ann"})["password"])
    for guess in (PASSWORD.upper(), CANARY):
        send(server, {"path": "/login", "json": {"username": "admin", "password": guess}}, "")
        yield guess
    send(server, {"pieces": ['{"prompt": "', CANARY]}, server.token)
    send(server, {"json": {CANARY: 1}}, server.token)
    send(server, {"wire": [f"GET /{CANARY} HTTP/9\r\nAuthorization: Bearer {server.token}\r\n\r\n"]}, "")
    send(server, {"wire": [f"GET / HTTP/1.1\r\nHost: x\r\nAuthorization Bearer {server.token}\r\n\r\n"]}, "")
    yield CANARY


@pytest.mark.promise(
    "P1", injected="secrets in every place of every request, at LOG_LEVEL=debug", counted="log, data and metrics"
)
def test_nothing_that_was_written_holds_a_secret(tmp_path: Path, counted: Callable[..., None]) -> None:
    with Server(tmp_path, PASSWORD, LOG_LEVEL="debug", LOG_FILE=str(tmp_path / "service.log")) as server:
        secrets = list(work(server))
        eventually(lambda: server.open_streams() == 0)
        with closing(server.connect("GET", "/metrics")) as connection:
            (tmp_path / "metrics").write_bytes(connection.getresponse().read())
    found = dict(written(tmp_path))
    assert {"log", "service.log", "metrics", "service.sqlite3"} <= {file.name for file in found}
    leaks = [(secret, file.name) for file in found for secret in secrets if secret.encode() in found[file]]
    leaks += [("a token", file.name) for file in found if TOKEN.search(found[file])]
    counted(files=len(found), secrets=len(secrets), leaks=len(leaks))
    assert leaks == []
    assert json.loads((tmp_path / "service.log").read_text().splitlines()[-1]), "whole lines"
