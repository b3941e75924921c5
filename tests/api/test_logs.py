"""What the log says about a request, and what it never says."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from tests.api.conftest import PASSWORD, Client

Lines = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def logged(make_app: Callable[..., Flask], tmp_path: Path) -> tuple[Client, Lines]:
    """A caller, and the lines of the log so far."""
    file = tmp_path / "log"
    app = make_app(log_file=file, log_level="debug")
    return Client(app), lambda: [json.loads(line) for line in file.read_text().splitlines()]


def requests(lines: Lines) -> list[dict[str, Any]]:
    return [line for line in lines() if line["event"] == "request"]


def test_one_line_a_request_says_what_happened(logged: tuple[Client, Lines]) -> None:
    nobody, lines = logged
    admin = nobody.login()
    admin.post("/generate", {"prompt": "hello world", "temperature": 0}, headers={"X-Request-Id": "r-1"}).close()
    line = requests(lines)[-1]
    assert {name: line[name] for name in ("request_id", "method", "route", "path", "status", "user", "cache")} == {
        "request_id": "r-1",
        "method": "POST",
        "route": "/generate",
        "path": "/generate",
        "status": 200,
        "user": "admin",
        "cache": "miss",
    }
    assert (line["completion_tokens"], line["finish_reason"], line["level"]) == (2, "stop", "info")
    assert line["duration_ms"] > 0 and line["timestamp"].endswith("Z")
    assert len(requests(lines)) == 2


def test_a_streams_line_comes_at_its_end_with_its_tokens(logged: tuple[Client, Lines]) -> None:
    nobody, lines = logged
    admin = nobody.login()
    with admin.post("/stream", {"prompt": "one two three"}) as answer:
        assert len(requests(lines)) == 1
        assert "done" in answer.text
    assert requests(lines)[-1]["completion_tokens"] == 3
    admin.post("/stream", {"prompt": "break one two three"}).close()
    with admin.post("/stream", {"prompt": "break one two three"}) as answer:
        assert "error" in answer.text
    assert requests(lines)[-1]["error"] == "generation_failed"


def test_no_prompt_token_password_or_ticket_is_ever_logged(logged: tuple[Client, Lines], tmp_path: Path) -> None:
    nobody, lines = logged
    admin = nobody.login()
    nobody.post("/login", {"username": "admin", "password": "hunter2-wrong"})
    ticket = admin.post("/stream/ticket", {"prompt": "secret-one"}).json["ticket"]
    nobody.get("/stream", query_string={"ticket": ticket}).close()
    key = admin.post("/keys", {"name": "secret-name"}).json["key"]
    for prompt in ("secret-two", "bug secret-three now", "fail secret-four", "break secret-five it"):
        for path in ("/generate", "/stream"):
            admin.post(path, {"prompt": prompt}).close()
            Client(nobody.app, key).post(path, {"prompt": prompt, "temperature": "secret-six"})
    admin.post("/generate", data=b'{"prompt": "secret-seven', content_type="application/json")
    admin.get("/keys?password=secret-eight")
    assert any(line["event"] == "unexpected" for line in lines())
    text = (tmp_path / "log").read_text()
    for secret in ("secret-", "hunter2", PASSWORD, admin.token, key, ticket, "eyJ"):
        assert secret not in text


def test_a_line_break_in_what_a_client_sends_makes_no_second_line(logged: tuple[Client, Lines]) -> None:
    nobody, lines = logged
    nobody.get("/nowhere%0d%0a%7B%22level%22:%22INFO%22%7D").close()
    (line,) = requests(lines)
    assert line["path"] == '/nowhere\r\n{"level":"INFO"}'


def test_other_libraries_lines_are_json_too_and_their_secrets_masked(logged: tuple[Client, Lines]) -> None:
    _, lines = logged
    logging.getLogger("gunicorn.error.test").warning("bad header %r", "Authorization: Bearer abc.def")
    logging.getLogger("another").info("GET /stream?ticket=abcdef HTTP/1.1")
    texts = [line["event"] for line in lines()][-2:]
    assert texts == ["bad header 'Authorization: [masked]'", "GET /stream?[masked] HTTP/1.1"]
