"""When an answer is remembered, for whom, and how it comes back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.api.conftest import Client
from tests.api.scripted import ScriptedBackend
from tests.api.test_generate import events

BODY: dict[str, Any] = {"prompt": "think big blue sky", "temperature": 0}


def test_the_second_answer_is_a_hit_and_costs_no_generation(admin: Client, backend: ScriptedBackend) -> None:
    first, second = admin.post("/generate", BODY), admin.post("/generate", BODY)
    assert [first.headers["X-Cache"], second.headers["X-Cache"]] == ["miss", "hit"]
    assert second.json == {**first.json, "cached": True, "id": second.headers["X-Request-Id"]}
    assert len(backend.submitted) == 1


def test_a_hit_replays_as_a_stream_and_a_stream_can_be_remembered(admin: Client, backend: ScriptedBackend) -> None:
    first = events(admin.post("/stream", BODY).text)
    replayed = admin.post("/stream", BODY)
    second = events(replayed.text)
    assert replayed.headers["X-Cache"] == "hit"
    for channel in ("reasoning", "answer"):
        texts = ["".join(d["text"] for _, d in found if d.get("channel") == channel) for found in (first, second)]
        assert texts[0] == texts[1] != ""
    assert second[-1][1]["cached"] is True and second[-1][1]["usage"] == first[-1][1]["usage"]
    assert len(backend.submitted) == 1


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        ({"prompt": "hi"}, {}),
        ({"prompt": "hi", "temperature": 0, "cache": False}, {}),
        ({"prompt": "hi", "temperature": 0}, {"Cache-Control": "no-store"}),
    ],
    ids=["by chance", "cache off", "no-store"],
)
def test_what_must_not_be_remembered_is_not(
    admin: Client, backend: ScriptedBackend, body: dict[str, Any], headers: dict[str, str]
) -> None:
    uses = [admin.post("/generate", body, headers=headers).headers["X-Cache"] for _ in range(2)]
    assert uses == ["off", "off"]
    assert len(backend.submitted) == 2


@pytest.mark.promise("P21", injected="each parameter changed in turn")
@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "think big blue sky "},
        {"max_new_tokens": 3},
        {"temperature": 0.5, "seed": 1},
        {"temperature": 0.5, "seed": 2},
        {"top_p": 0.9},
        {"top_k": 7},
        {"repetition_penalty": 1.1},
        {"stop": ["zzz"]},
        {"stop": ["z", "zz"]},
        {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": BODY["prompt"]}]},
    ],
    ids=str,
)
def test_every_parameter_is_part_of_the_key(
    admin: Client, counted: Callable[..., None], change: dict[str, Any]
) -> None:
    admin.post("/generate", BODY)
    body = {**BODY, **change}
    if "messages" in body:
        del body["prompt"]
    uses = [admin.post("/generate", body).headers["X-Cache"] for _ in range(2)]
    counted(misses=uses.count("miss"), hits_afterwards=uses.count("hit"))
    assert uses == ["miss", "hit"]


@pytest.mark.promise("P19", injected="the same prompt from two users", counted="for the second and for the first")
def test_users_do_not_share_answers(
    admin: Client, add_user: Callable[..., Client], counted: Callable[..., None]
) -> None:
    admin.post("/generate", BODY)
    uses = [caller.post("/generate", BODY).headers["X-Cache"] for caller in (add_user("bob"), admin)]
    counted(miss=uses.count("miss"), hit=uses.count("hit"))
    assert uses == ["miss", "hit"]


def test_users_share_answers_where_the_operator_says_so(make_app: Callable[..., Any]) -> None:
    app = make_app(cache_shared=True)
    services = app.extensions["flask-llm"]
    services.users.add("bob", "user", services.passwords.hash("correct horse battery"))
    admin, bob = Client(app).login(), Client(app).login("bob")
    assert [caller.post("/generate", BODY).headers["X-Cache"] for caller in (admin, bob)] == ["miss", "hit"]


@pytest.mark.promise("P21", injected="failures and a cancel", counted="nothing remembered")
def test_failed_and_cancelled_answers_are_not_remembered(
    admin: Client, backend: ScriptedBackend, counted: Callable[..., None]
) -> None:
    broken = {"prompt": "break one two three", "temperature": 0}
    silent = {"prompt": "silent", "temperature": 0}
    statuses = [admin.post("/generate", broken).status_code for _ in range(2)]
    for _ in range(2):
        with admin.post("/stream", silent) as stream:
            statuses.append(stream.status_code)
    assert backend.wait_until_idle(5)
    counted(requests=len(statuses), generations=len(backend.submitted))
    assert statuses == [503, 503, 200, 200]
    assert len(backend.submitted) == 4


def test_equal_requests_at_once_are_two_generations_and_one_may_end_without_the_other(
    admin: Client, backend: ScriptedBackend
) -> None:
    body = {"prompt": "slow one two three", "temperature": 0}
    first, second = admin.post("/stream", body), admin.post("/stream", body)
    first.close()
    assert events(second.text)[-1][1]["finish_reason"] == "stop"
    assert len(backend.submitted) == 2


def test_a_cancelled_answer_tells_what_it_used(admin: Client) -> None:
    body = {"prompt": "slow " + "word " * 100, "temperature": 0}
    stream = admin.post("/stream", body, headers={"X-Request-Id": "mine"})
    text = iter(stream.response)
    while b'"text": " word"' not in next(text):
        pass
    assert admin.ask("DELETE", "/requests/mine").status_code == 204
    name, done = events(b"".join(text).decode())[-1]
    assert (name, done["finish_reason"]) == ("done", "cancelled")
    assert done["usage"]["completion_tokens"] >= 2 and done["usage"]["prompt_tokens"] > 100
    stream.close()
