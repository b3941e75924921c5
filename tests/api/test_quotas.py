"""Limits by user and by role, as a client meets them: statuses, headers, and what a generation costs."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from api.context import NAME, Services
from db import Database
from errors import StoreUnavailable
from model.types import GenerateRequest, Message
from quotas.usage import Counts, UsageStore
from tests.api.conftest import PASSWORD, Client, assert_refused
from tests.api.scripted import MODEL, ScriptedBackend
from tests.api.server import Server
from tests.api.test_generate import events
from tests.quotas.test_usage import usage

WORDS = {"prompt": "one two three", "max_new_tokens": 10, "cache": False}
PROMPT = len("user:one two three")  # the script's tokens of a prompt are its letters, those of an answer its words
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": WORDS["prompt"]}], "max_tokens": 10}
COST, MOST = PROMPT + 3, PROMPT + 10


@pytest.fixture
def bob(add_user: Callable[..., Client]) -> Client:
    return add_user("bob")


def limit(services: Services, **limits: int) -> None:
    services.users.change("bob", **limits)  # type: ignore[typeddict-item]


def left(answer: Any, kind: str) -> int:
    return int(answer.headers[f"X-RateLimit-Remaining-{kind}"])


def bob_id(services: Services) -> str:
    user = services.users.get("bob")
    assert user is not None
    return user.id


def spent(services: Services) -> int:
    return services.usage.tokens_today(bob_id(services))


def recorded(services: Services) -> Counts:
    """All that was recorded for bob today."""
    today = int(time.time() // 86_400)
    rows = usage(services.usage, today, today)
    return sum((counts for (_, user_id, _), counts in rows.items() if user_id == bob_id(services)), Counts())


def free(services: Services, limit: int) -> int:
    """What bob could still reserve."""
    return services.usage.reserve(bob_id(services), 0, limit).remaining.left


def test_every_answer_says_how_many_requests_are_left(bob: Client, services: Services) -> None:
    limit(services, rpm=3)
    answers = [bob.get("/v1/models") for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert [left(answer, "Requests") for answer in answers] == [2, 1, 0, 0]
    assert {answer.headers["X-RateLimit-Limit-Requests"] for answer in answers} == {"3"}
    assert_refused(answers[-1], 429)
    assert answers[-1].json["error"]["code"] == "rate_limited" and "X-Should-Retry" not in answers[-1].headers
    assert 50 <= int(answers[-1].headers["Retry-After"]) <= 60
    assert 50 < float(answers[-1].headers["X-RateLimit-Reset-Requests"].removesuffix("s")) <= 60


def test_a_refused_user_harms_no_other(bob: Client, admin: Client, services: Services) -> None:
    limit(services, rpm=1)
    assert [bob.get("/v1/models").status_code for _ in range(2)] == [200, 429]
    assert admin.get("/v1/models").status_code == 200


def test_roles_have_limits_and_a_users_own_win_over_them(make_app: Callable[..., Flask]) -> None:
    app = make_app(role_limits="admin.rpm=2,admin.streams=3", user_rpm=50)
    admin = Client(app).login()
    assert admin.get("/v1/models").headers["X-RateLimit-Limit-Requests"] == "2"
    app.extensions[NAME].users.change("admin", rpm=9)
    assert admin.get("/v1/models").headers["X-RateLimit-Limit-Requests"] == "9"
    shown = admin.get("/admin/users/admin").json
    assert (shown["limits"]["streams"], shown["limits"]["rpm"], shown["own_limits"]["streams"]) == (3, 9, None)


def test_one_stream_too_many_is_429_until_one_ends(bob: Client, services: Services) -> None:
    limit(services, streams=2)
    silent = {"prompt": "silent", "cache": False}
    with ExitStack() as streams:
        for _ in range(2):
            streams.enter_context(bob.post("/stream", silent))
        for path in ("/stream", "/generate"):
            refused = bob.post(path, WORDS)
            assert_refused(refused, 429)
            assert refused.headers["Retry-After"] == "1"
    assert bob.post("/generate", WORDS).status_code == 200


def test_a_generation_costs_what_it_used_and_not_what_it_might_have(bob: Client, services: Services) -> None:
    limit(services, tokens_per_day=100)
    answer = bob.post("/generate", WORDS)
    assert answer.json["usage"]["total_tokens"] == COST == spent(services)
    assert (answer.headers["X-RateLimit-Limit-Tokens"], left(answer, "Tokens")) == ("100", 100 - MOST)
    stream = bob.post("/stream", WORDS)
    assert events(stream.text)[-1][1]["usage"]["total_tokens"] == COST
    stream.close()
    assert spent(services) == 2 * COST


def test_a_quota_that_is_used_up_is_429_until_tomorrow(
    bob: Client, services: Services, backend: ScriptedBackend
) -> None:
    limit(services, tokens_per_day=MOST + COST - 1)
    assert bob.post("/generate", WORDS).status_code == 200
    for path, body in (
        ("/generate", WORDS),
        ("/stream", WORDS),
        ("/v1/chat/completions", CHAT),
    ):
        refused = bob.post(path, body)
        assert_refused(refused, 429)
        assert refused.json["error"]["code"] == "insufficient_quota"
        assert refused.headers["X-Should-Retry"] == "false" and 0 < int(refused.headers["Retry-After"]) <= 86_400
        assert left(refused, "Tokens") == MOST - 1
    assert len(backend.submitted) == 1 and spent(services) == COST
    assert bob.post("/generate", {**WORDS, "max_new_tokens": 9}).status_code == 200, "a shorter one still fits"


def test_what_running_generations_may_take_is_set_aside(bob: Client, services: Services) -> None:
    silent = {"prompt": "silent", "max_new_tokens": 50, "cache": False}
    aside = len("user:silent") + 50
    limit(services, tokens_per_day=aside + 20)
    with bob.post("/stream", silent) as stream:
        refused = bob.post("/generate", silent)
        assert_refused(refused, 429)
        assert (refused.json["error"]["code"], refused.headers["Retry-After"]) == ("rate_limited", "1")
        assert "X-Should-Retry" not in refused.headers
        assert left(stream, "Tokens") == left(refused, "Tokens") == 20
    assert bob.post("/generate", {**silent, "prompt": "sounds"}).status_code == 200


def test_a_cached_answer_costs_no_tokens(bob: Client, services: Services) -> None:
    limit(services, tokens_per_day=MOST)
    sure = {**WORDS, "temperature": 0, "cache": True}
    answers = [bob.post("/generate", sure) for _ in range(4)]
    assert [answer.headers["X-Cache"] for answer in answers] == ["miss", "hit", "hit", "hit"]
    assert recorded(services) == Counts(requests=4, prompt_tokens=PROMPT, generated_tokens=3)


def test_whoever_leaves_early_pays_what_came(bob: Client, services: Services) -> None:
    limit(services, tokens_per_day=1000)
    with bob.post("/stream", {**WORDS, "prompt": "slow " + "and on " * 20}) as stream:
        for frame in stream.response:
            if b"and" in frame:
                break
    assert spent(services) == len("user:slow " + "and on " * 20) + 2


@pytest.mark.parametrize(("prompt", "status", "cost"), [("refuse", 503, 0), ("fail", 503, 0), ("break a b c", 503, 18)])
def test_what_fails_costs_only_what_came_of_it(
    bob: Client, services: Services, prompt: str, status: int, cost: int
) -> None:
    limit(services, tokens_per_day=1000)
    assert bob.post("/generate", {**WORDS, "prompt": prompt}).status_code == status
    assert spent(services) == cost
    assert free(services, 1000) == 1000 - cost, "something is still set aside"


def test_a_request_that_is_refused_before_it_runs_costs_nothing(bob: Client, services: Services) -> None:
    limit(services, tokens_per_day=1000)
    for body in ({"prompt": ""}, {"prompt": "hi", "max_new_tokens": 5000}, {"prompt": "hi", "model": "no"}):
        assert bob.post("/generate", body).status_code in (404, 422)
    assert free(services, 1000) == 1000 and recorded(services) == Counts()


def test_a_ticket_is_paid_when_it_is_used(bob: Client, nobody: Client, services: Services) -> None:
    limit(services, tokens_per_day=MOST)
    tickets = [bob.post("/stream/ticket", WORDS).json["ticket"] for _ in range(2)]
    assert spent(services) == 0
    statuses = []
    for ticket in tickets:
        with nobody.get("/stream", query_string={"ticket": ticket}) as stream:
            statuses.append((stream.status_code, stream.text != ""))
    assert statuses == [(200, True), (429, True)] and spent(services) == COST


def test_quotas_are_exact_for_32_requests_at_once(bob: Client, services: Services) -> None:
    """All that are let in together fit, even if each takes all it may."""
    limit(services, tokens_per_day=10 * MOST + 5, streams=100)
    silent = {"prompt": "silent one two", "max_new_tokens": MOST - len("user:silent one two"), "cache": False}
    with ExitStack() as held:

        def begin(_: int) -> int:
            return held.enter_context(bob.post("/stream", silent)).status_code

        with ThreadPoolExecutor(32) as pool:
            assert sorted(pool.map(begin, range(32))) == [200] * 10 + [429] * 22


def test_tokens_that_cannot_be_recorded_end_no_answer_and_count_later(
    bob: Client, services: Services, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    limit(services, tokens_per_day=MOST)

    def full(*_: object) -> None:
        raise StoreUnavailable("the database does not answer (SQLITE_FULL)")

    with monkeypatch.context() as patched:
        patched.setattr("quotas.usage._insert", full)
        assert bob.post("/generate", WORDS).json["response"] == "one two three"
        assert "usage is kept in memory" in caplog.text
        assert_refused(bob.post("/generate", WORDS), 429)
    assert spent(services) == COST and free(services, MOST) == MOST - COST


def test_a_quota_that_cannot_be_looked_up_lets_nobody_in(
    bob: Client, services: Services, backend: ScriptedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(services, tokens_per_day=1000)

    def full(*_: object) -> None:
        raise StoreUnavailable("the database does not answer (SQLITE_FULL)")

    monkeypatch.setattr("quotas.usage.UsageStore.reserve", full)
    assert_refused(bob.post("/generate", WORDS), 503)
    assert backend.submitted == []


def test_tokens_of_today_are_shown_without_a_quota_too(bob: Client, admin: Client, services: Services) -> None:
    bob.post("/generate", WORDS)
    stream = bob.post("/stream", WORDS)
    assert events(stream.text)[-1][0] == "done"
    stream.close()
    assert bob.post("/generate", {**WORDS, "prompt": "fail"}).status_code == 503
    assert admin.get("/admin/users/bob").json["tokens_today"] == 2 * COST
    listed = {user["username"]: user["tokens_today"] for user in admin.get("/admin/users").json["users"]}
    assert listed == {"admin": 0, "bob": 2 * COST}
    assert recorded(services) == Counts(3, 2 * PROMPT, 0, 6, errors=1)


@pytest.mark.parametrize(("sent", "wait"), [(signal.SIGTERM, 0.0), (signal.SIGKILL, 2.0)])
def test_usage_outlives_a_clean_stop_and_a_kill_costs_a_second_of_it(
    tmp_path: Path, sent: signal.Signals, wait: float
) -> None:
    with Server(tmp_path, PASSWORD) as server:
        for _ in range(3):
            server.ask("POST", "/generate", {**WORDS, "temperature": 0, "cache": True})
        time.sleep(wait)
        os.killpg(server.process.pid, sent) if sent == signal.SIGKILL else server.process.send_signal(sent)
        server.process.wait(20)
    store, today = UsageStore(Database.in_folder(tmp_path / "data"), 1), int(time.time() // 86_400)
    assert sum(usage(store, today - 1, today).values(), Counts()) == Counts(3, PROMPT, 0, 3)


@pytest.mark.promise("P17", injected="a Redis that is gone", counted="limits hold")
def test_without_redis_everything_goes_on(make_app: Callable[..., Flask], counted: Callable[..., None]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    app = make_app(redis_url=f"redis://127.0.0.1:{port}/0", role_limits="admin.rpm=9")
    admin = Client(app).login()
    answers = [admin.post("/generate", WORDS) for _ in range(10)]
    statuses = [answer.status_code for answer in answers]
    counted(served=statuses.count(200), over_the_limit=statuses.count(429))
    assert statuses == [200] * 9 + [429]
    assert [left(answer, "Requests") for answer in answers] == [*range(8, -1, -1), 0]
    assert Client(app).get("/readyz").status_code == 200


def test_the_script_counts_as_these_tests_do(backend: ScriptedBackend) -> None:
    prepared = backend.prepare(GenerateRequest("i", "bob", MODEL, (Message("user", WORDS["prompt"]),)))
    assert len(prepared.prompt_ids) == PROMPT
