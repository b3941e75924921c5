"""The whole: a client, TLS, nginx, gunicorn, the demo model and Redis, as docker compose runs them."""

from __future__ import annotations

import http.client
import json
import os
import signal
import ssl
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import openai
import pytest

from ops.stack import ROOT, Stack, free_port, listening, program
from tests.stack.client import Door, events, until
from tests.stack.conftest import PASSWORD, SMALL, need

LONG = {"prompt": "Tell a long story about the sea.", "max_new_tokens": 400, "cache": False, "seed": 1}
CANCELLED = 'llm_requests_finished_total{reason="cancelled"}'


def running(door: Door) -> float:
    return door.metric("llm_requests_running")


def test_a_question_is_answered_and_asked_again_comes_from_redis(door: Door) -> None:
    question = {"prompt": "Why is the sky blue?", "max_new_tokens": 8, "temperature": 0}
    first, again = door.ask("POST", "/generate", question), door.ask("POST", "/generate", question)
    assert (first.status, first.headers["X-Cache"]) == (200, "miss")
    assert (again.status, again.headers["X-Cache"]) == (200, "hit")
    assert first.json["response"] == again.json["response"] != ""
    assert door.metric('llm_cache_lookups_total{result="hit"}') == 1
    assert not list((door.stack.folder.parent / "data").glob("cache.sqlite3"))  # so it was Redis


def test_a_stream_arrives_token_by_token(door: Door) -> None:
    with door.open("POST", "/stream", LONG | {"max_new_tokens": 24}) as response:
        assert response.headers.get_all("Content-Type") == ["text/event-stream; charset=utf-8"]
        arriving = events(response)
        seen = [next(event for event in arriving if event[0] == "message")]
        assert running(door) == 1  # the first word is here while the others are still being made
        seen += arriving
    words = [data["text"] for name, data in seen if name == "message"]
    assert len(words) > 10 and seen[-1][0] == "done"


def test_a_stream_says_what_the_whole_answer_says(door: Door) -> None:
    question = {"prompt": "Écris un poème: 雨 ☔", "max_new_tokens": 48, "temperature": 0, "cache": False}
    whole = door.ask("POST", "/generate", question).json
    with door.open("POST", "/stream", question) as response:
        seen = list(events(response))
    text = "".join(data["text"] for name, data in seen if name == "message")
    assert text == whole["response"] != "" and "\ufffd" not in text
    (done,) = [data for name, data in seen if name == "done"]
    assert done["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]


def test_the_official_client_streams_through_it(door: Door) -> None:
    trusted = ssl.create_default_context(cafile=door.stack.secrets / "tls.crt")
    url = f"https://localhost:{door.stack.https}/v1"
    with openai.OpenAI(
        api_key=door.token, base_url=url, http_client=openai.DefaultHttpxClient(verify=trusted)
    ) as client:
        model = client.models.list().data[0].id
        messages = [{"role": "user", "content": LONG["prompt"]}]
        with client.chat.completions.create(model=model, messages=messages, max_tokens=24, stream=True) as chunks:
            first = next(chunk for chunk in chunks if chunk.choices and chunk.choices[0].delta.content)
            assert first and running(door) == 1
            assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] in {"stop", "length"}


@pytest.mark.promise("P10", injected="a client of nginx that hangs up")
@pytest.mark.parametrize("path", ["/stream", "/generate"])
def test_a_client_that_hangs_up_frees_its_slot(door: Door, path: str, counted: Callable[..., None]) -> None:
    cancelled = door.metric(CANCELLED)
    with closing(door.connect()) as connection:
        headers = {"Authorization": f"Bearer {door.token}", "Content-Type": "application/json"}
        connection.request("POST", path, json.dumps(LONG), headers)
        until(lambda: running(door) == 1)
    until(lambda: running(door) == 0, seconds=5)
    counted(cancelled=int(door.metric(CANCELLED) - cancelled), still_running=int(running(door)))
    assert door.metric(CANCELLED) == cancelled + 1


def test_each_header_is_sent_once(door: Door) -> None:
    headers = door.ask("GET", "/healthz").headers
    for name in ("X-Content-Type-Options", "Referrer-Policy", "Content-Security-Policy", "X-Request-Id"):
        assert len(headers.get_all(name) or []) == 1, name


def test_the_request_id_is_one_from_client_to_app(door: Door) -> None:
    assert door.ask("GET", "/healthz", headers={"X-Request-Id": "order-66"}).headers["X-Request-Id"] == "order-66"


def test_the_app_s_own_errors_come_through_unchanged(door: Door) -> None:
    answer = Door(door.stack).ask("POST", "/generate", {"prompt": "hello"})
    assert (answer.status, answer.json["error"]["code"]) == (401, "unauthorized")


def test_a_forged_forwarded_for_does_not_hide_a_guesser(door: Door) -> None:
    def guess(last: int) -> int:
        forged = {"X-Forwarded-For": f"10.1.1.{last}", "Forwarded": f"for=10.1.1.{last}", "X-Real-IP": f"10.1.1.{last}"}
        guessed = {"username": "admin", "password": "not the password"}
        return Door(door.stack).ask("POST", "/login", guessed, forged, address="127.0.0.9").status

    assert [guess(number) for number in range(5)] == [401] * 5
    # The sixth would be stopped by nginx; what the app itself counted is seen by asking it as the proxy.
    with closing(http.client.HTTPConnection("127.0.0.1", door.stack.app, timeout=30)) as proxy:
        headers = {"X-Forwarded-For": "127.0.0.9", "Content-Type": "application/json"}
        proxy.request("POST", "/login", json.dumps({"username": "admin", "password": "not the password"}), headers)
        with proxy.getresponse() as response:
            assert (response.status, int(response.headers["Retry-After"]) > 60) == (429, True)


def test_prometheus_can_read_every_metric(door: Door) -> None:
    need("promtool")
    scraped = door.direct("/metrics").body
    checked = subprocess.run([program("promtool"), "check", "metrics"], input=scraped, capture_output=True)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, b"")


@pytest.mark.promise("P11", injected="SIGTERM behind nginx, with the real model", counted="exit 0")
def test_sigterm_ends_a_stream_with_done_or_error(data_dir: Path, tmp_path: Path, counted: Callable[..., None]) -> None:
    need("redis-server", "nginx", "openssl")
    settings = SMALL | {"DATA_DIR": str(data_dir), "GRACE_PERIOD": "3"}
    with (tmp_path / "log").open("wb") as log, Stack(tmp_path / "stack", settings, free_port(), log) as stack:
        door = Door(stack).login(PASSWORD)
        with door.open("POST", "/stream", LONG) as response:
            arriving = events(response)
            assert next(event for event in arriving if event[0] != "status")[0] == "message"
            stack.processes["gunicorn"].send_signal(signal.SIGTERM)
            until(lambda: door.direct("/readyz").status == 503, seconds=3)
            names = [name for name, _ in arriving]
        counted(text_events=1 + names.count("message"), final_events=names.count("done") + names.count("error"))
        assert names[-1] in {"done", "error"}
        assert stack.processes["gunicorn"].wait(15) == 0


def test_ctrl_c_ends_make_stack_and_all_that_it_started(data_dir: Path) -> None:
    need("redis-server", "nginx", "openssl")
    https = free_port()
    environment = {**os.environ, **SMALL, "DATA_DIR": str(data_dir), "HTTPS_PORT": str(https)}
    with subprocess.Popen(
        [sys.executable, "-m", "ops.stack"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert any(f"https://localhost:{https}" in line for line in process.stdout)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 3 and listening(https)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    assert not listening(https) and not any(Path(f"/proc/{child}").exists() for child in children)
