"""POST /generate, POST /stream and DELETE /requests/<id>, in process."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from threading import Thread
from typing import Any

import pytest
from flask import Flask

from api.context import NAME, Services
from tests.api.audited import records
from tests.api.conftest import Client
from tests.api.scripted import MODEL, ScriptedBackend
from tests.api.server import eventually


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    """A stream's events as (name, data); comments are left out."""
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if line and line[0] != ":")
        if "data" in fields:
            found.append((fields.get("event", "message"), json.loads(fields["data"])))
    return found


def test_generate_answers_in_the_contracts_shape(admin: Client) -> None:
    answer = admin.post("/generate", {"prompt": "think big blue sky", "temperature": 0})
    assert answer.status_code == 200
    assert answer.json == {
        "id": answer.headers["X-Request-Id"],
        "model": MODEL,
        "response": "think big blue sky",
        "reasoning": "hm",
        "finish_reason": "stop",
        "usage": {
            "prompt_tokens": 23,
            "completion_tokens": 4,
            "total_tokens": 27,
            "cached_tokens": 0,
            "reasoning_tokens": 0,
        },
        "cached": False,
        "served_by": "local",
        "sanitised": 0,
    }
    assert "X-Sanitised" not in answer.headers


def test_the_joined_stream_is_the_whole_answer(admin: Client) -> None:
    body = {"prompt": "think big blue sky über 🦊", "temperature": 0, "cache": False}
    whole = admin.post("/generate", body).json
    stream = admin.post("/stream", body)
    assert stream.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert stream.headers["Cache-Control"] == "no-cache"
    assert stream.headers["X-Accel-Buffering"] == "no"
    found = events(stream.text)
    texts = [data for name, data in found if name == "message"]
    assert "".join(data["text"] for data in texts if data["channel"] == "answer") == whole["response"]
    assert "".join(data["text"] for data in texts if data["channel"] == "reasoning") == whole["reasoning"]
    name, done = found[-1]
    assert name == "done"
    assert done == {"id": stream.headers["X-Request-Id"], **{k: whole[k] for k in done if k != "id"}}
    assert [line for line in stream.text.splitlines() if line.startswith("id: ")] == [f"id: {n}" for n in range(1, 8)]


def test_what_was_asked_reaches_the_model(admin: Client, backend: ScriptedBackend) -> None:
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    sent = {"temperature": 1, "top_p": 0.5, "top_k": 3.0, "repetition_penalty": 1.5, "seed": -7}
    admin.post("/generate", {"messages": turns, "max_new_tokens": 5.0, "stop": ["x"], **sent})
    (request,) = backend.submitted
    assert [(turn.role, turn.content) for turn in request.messages] == [("system", "be brief"), ("user", "hi")]
    assert {name: getattr(request.sampling, name) for name in sent} == sent
    owner = admin.app.extensions[NAME].users.get("admin").id
    assert (request.max_new_tokens, request.stop, request.owner) == (5, ("x",), owner)


def test_the_defaults_are_those_of_the_contract(admin: Client, backend: ScriptedBackend) -> None:
    admin.post("/generate", {"prompt": "hi"})
    (request,) = backend.submitted
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.6, 0.95, 50, None)
    assert (request.max_new_tokens, request.timeout, request.model) == (256, 300, MODEL)


def test_html_that_can_act_is_removed_and_code_is_not(admin: Client, backend: ScriptedBackend) -> None:
    admin.post("/generate", {"prompt": "<!-- x --><b>if</b> a<b && c>d: vector<int> v;"})
    assert backend.submitted[0].messages[0].content == "<b>if</b> a<b && c>d: vector<int> v;"


def test_sanitising_can_be_switched_off(make_app: Callable[..., Any], backend: ScriptedBackend) -> None:
    Client(make_app(sanitise="off")).login().post("/generate", {"prompt": "<script>hi</script>"})
    assert backend.submitted[0].messages[0].content == "<script>hi</script>"


@pytest.mark.parametrize("path", ["/generate", "/stream"])
def test_what_was_removed_is_told_and_assistant_turns_are_left_as_they_are(
    app: Flask, admin: Client, backend: ScriptedBackend, path: str
) -> None:
    app.extensions[NAME].sanitise = lambda text: (text.replace("!", ""), text.count("!"))
    turns = [("system", "a!"), ("user", "b!!"), ("assistant", "c!"), ("user", "d")]
    messages = [{"role": role, "content": content} for role, content in turns]
    answer = admin.post(path, {"messages": messages})
    found = answer.json if path == "/generate" else events(answer.text)[-1][1]
    assert (answer.headers["X-Sanitised"], found["sanitised"]) == ("3", 3)
    assert [message.content for message in backend.submitted[0].messages] == ["a", "b", "c!", "d"]


def test_a_prompt_of_nothing_but_html_is_refused(admin: Client, backend: ScriptedBackend) -> None:
    answer = admin.post("/generate", {"prompt": "<script> </script>"})
    assert (answer.status_code, answer.json["error"]["param"]) == (422, "prompt")
    assert not backend.submitted


@pytest.mark.parametrize("path", ["/generate", "/stream"])
@pytest.mark.parametrize(
    ("prompt", "status", "code", "retry"),
    [("refuse me", 503, "overloaded", "3"), ("fail now", 503, "generation_failed", "1")],
)
def test_an_early_failure_keeps_its_status(
    admin: Client, path: str, prompt: str, status: int, code: str, retry: str
) -> None:
    answer = admin.post(path, {"prompt": prompt})
    assert (answer.status_code, answer.json["error"]["code"]) == (status, code)
    assert answer.headers["Retry-After"] == retry
    assert answer.json["error"]["request_id"] == answer.headers["X-Request-Id"]


def test_a_late_failure_is_the_streams_last_event(admin: Client) -> None:
    answer = admin.post("/stream", {"prompt": "break one two three"})
    assert answer.status_code == 200
    assert [name for name, _ in events(answer.text)] == ["message", "message", "error"]
    error = events(answer.text)[-1][1]["error"]
    assert (error["code"], error["type"]) == ("generation_failed", "overloaded_error")


@pytest.mark.parametrize("path", ["/generate", "/stream"])
def test_a_bug_is_an_error_that_quotes_nobody(admin: Client, path: str) -> None:
    answer = admin.post(path, {"prompt": "bug with a secret"})
    assert "internal_error" in answer.text
    assert "secret" not in answer.text.replace('{"text": " secret"', "") and "Traceback" not in answer.text
    assert answer.status_code == (500 if path == "/generate" else 200)


def test_what_the_model_says_cannot_end_or_forge_an_event(admin: Client) -> None:
    said = "data: [DONE]\n\nevent: done\ndata: {}\r\nid: 9"
    found = events(admin.post("/stream", {"prompt": said}).text)
    assert "".join(data["text"] for name, data in found if name == "message") == said
    assert [name for name, _ in found].count("done") == 1


def test_an_unknown_model_is_404(admin: Client) -> None:
    answer = admin.post("/generate", {"prompt": "hi", "model": "../../etc/passwd"})
    assert answer.status_code == 404
    assert (answer.json["error"]["code"], answer.json["error"]["param"]) == ("model_not_found", "model")


def test_one_stream_too_many_is_429_and_a_closed_one_makes_room(make_app: Callable[..., Any]) -> None:
    admin = Client(make_app(user_streams=2)).login()
    running = [admin.post("/stream", {"prompt": "silent"}) for _ in range(2)]
    refused = admin.post("/stream", {"prompt": "hi"})
    assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
    running[0].close()
    assert admin.post("/stream", {"prompt": "hi"}).status_code == 200
    running[1].close()


def test_too_many_requests_in_a_minute_are_429(make_app: Callable[..., Any]) -> None:
    admin = Client(make_app(user_rpm=2)).login()
    assert [admin.get("/keys").status_code for _ in range(3)] == [200, 200, 429]


def test_a_cancelled_stream_ends_with_the_reason(admin: Client, backend: ScriptedBackend) -> None:
    stream = admin.post("/stream", {"prompt": "silent"}, headers={"X-Request-Id": "mine-1"})
    assert admin.ask("DELETE", "/requests/mine-1").status_code == 204
    assert events(stream.text)[-1][1]["finish_reason"] == "cancelled"
    stream.close()
    assert backend.wait_until_idle(5)
    assert admin.ask("DELETE", "/requests/mine-1").status_code == 404


def test_a_cancelled_call_that_does_not_stream_answers_too(admin: Client, backend: ScriptedBackend) -> None:
    answers: list[Any] = []
    call = Thread(
        target=lambda: answers.append(admin.post("/generate", {"prompt": "silent"}, headers={"X-Request-Id": "w"}))
    )
    call.start()
    eventually(lambda: admin.ask("DELETE", "/requests/w").status_code == 204)
    call.join(5)
    assert answers[0].json["finish_reason"] == "cancelled"


def test_nobody_cancels_anothers_request(admin: Client, add_user: Callable[..., Client]) -> None:
    stream = admin.post("/stream", {"prompt": "silent"}, headers={"X-Request-Id": "mine-2"})
    assert add_user("eve").ask("DELETE", "/requests/mine-2").status_code == 404
    assert admin.ask("DELETE", "/requests/mine-2").status_code == 204
    stream.close()


def test_an_administrator_sees_who_is_on_it_and_may_end_it(
    admin: Client, add_user: Callable[..., Client], services: Services
) -> None:
    bob = add_user("bob")
    assert bob.get("/admin/requests").status_code == 403
    with bob.post("/stream", {"prompt": "slow secret " + "word " * 200}, headers={"X-Request-Id": "bobs"}) as stream:
        frames = iter(stream.response)
        for _ in range(3):
            next(frames)
        (shown,) = admin.get("/admin/requests").json["requests"]
        assert (shown["id"], shown["user"], shown["model"], shown["state"]) == ("bobs", "bob", MODEL, "running")
        assert shown["tokens"] >= 2 and abs(time.time() - shown["started"]) < 60
        assert "secret" not in admin.get("/admin/requests").text
        assert admin.ask("DELETE", "/requests/bobs").status_code == 204
        assert b'"finish_reason": "cancelled"' in b"".join(frames)
    assert admin.get("/admin/requests").json == {"requests": []}
    (event,) = records(services, "request cancelled")
    assert (event["user"], event["account"], event["of_request"]) == ("admin", "bob", "bobs")


def test_a_response_that_nobody_reads_still_frees_its_slot(admin: Client, backend: ScriptedBackend) -> None:
    admin.post("/stream", {"prompt": "silent"}).close()
    assert backend.wait_until_idle(5)
