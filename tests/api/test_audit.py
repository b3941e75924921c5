"""What the audit log says of every way to have text made."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from flask import Flask

from api.context import NAME, Services
from tests.api.audited import CLEANED, SENT, WAYS, records, sha256, whole
from tests.api.conftest import Client, assert_refused


@pytest.mark.parametrize("route", list(WAYS))
@pytest.mark.promise("P12", counted="with hashes and tokens, hits and streams too")
def test_every_way_to_have_text_made_is_on_record(
    admin: Client, services: Services, counted: Callable[..., None], route: str
) -> None:
    for streamed in (False, True) if route.startswith("/v1") else (None,):
        extra = {} if streamed is None else {"stream": streamed}
        assert admin.post(route, {**WAYS[route], **extra}, headers={"X-Request-Id": "mine"}).text
    last_start, last_end = records(services)[-2:]
    assert (last_start["kind"], last_end["kind"]) == ("start", "end") and last_start["id"] == last_end["id"]
    for record in (last_start, last_end):
        assert (record["user"], record["request"], record["route"]) == ("admin", "mine", route)
        assert record["model"] == "smollm2-135m-instruct"
    assert last_start["raw_sha256"] == sha256(SENT) and last_start["input_sha256"] == sha256(CLEANED)
    assert last_start["parameters"]["temperature"] == 0 and last_start["role"] == "admin"
    assert last_end["outcome"] == "stop" and last_end["output_sha256"] == sha256("why is the sky blue")
    assert last_end["tokens"]["completion"] == 5 and last_end["served_by"] == "local"
    counted(starts=len(records(services, "start")), ends=len(records(services, "end")))
    assert whole(services)


def test_a_stream_by_ticket_is_on_record_too(admin: Client, nobody: Client, services: Services) -> None:
    ticket = admin.post("/stream/ticket", WAYS["/stream"]).json["ticket"]
    nobody.get(f"/stream?ticket={ticket}").close()
    start, end = records(services)
    assert (start["user"], end["outcome"], start["route"]) == ("admin", "client_gone", "/stream")


@pytest.mark.parametrize("route", ["/generate", "/stream"])
def test_a_cache_hit_is_on_record_like_any_answer(admin: Client, services: Services, route: str) -> None:
    for _ in range(2):
        assert admin.post(route, WAYS[route]).text
    miss, hit = records(services, "end")
    assert (miss["cache"], hit["cache"]) == ("miss", "hit")
    assert miss["output_sha256"] == hit["output_sha256"] and hit["outcome"] == "stop" and miss["id"] != hit["id"]


def test_each_reader_of_a_shared_generation_has_records_of_its_own(admin: Client, services: Services) -> None:
    body = {"prompt": "slow one two three four five six", "temperature": 0}
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda _: admin.post("/generate", body).json["response"], range(3)))
    assert len(set(answers)) == 1
    assert len({record["id"] for record in records(services, "start")}) == len(records(services, "end")) == 3


@pytest.mark.parametrize(
    ("body", "outcome"),
    [
        ({"prompt": "refuse this"}, "overloaded"),
        ({"prompt": "fail now"}, "generation_failed"),
        ({"prompt": "hello", "model": "other"}, "model_not_found"),
        ({"prompt": "hello", "max_new_tokens": 100_000}, "invalid_value"),
    ],
)
@pytest.mark.parametrize("route", ["/generate", "/stream"])
def test_a_refusal_is_on_record_with_its_reason(
    admin: Client, services: Services, route: str, body: dict[str, object], outcome: str
) -> None:
    assert admin.post(route, body).status_code >= 400
    start, end = records(services)
    assert end["outcome"] == outcome and end["id"] == start["id"] and end["output_sha256"] == sha256("")


def test_a_stream_that_breaks_is_on_record_with_what_was_said(admin: Client, services: Services) -> None:
    assert "event: error" in admin.post("/stream", {"prompt": "break after two words"}).text
    assert records(services)[-1]["outcome"] == "generation_failed"
    assert records(services)[-1]["output_sha256"] == sha256("break after")


def test_one_too_many_at_once_is_on_record(make_app: Callable[..., Flask]) -> None:
    app = make_app(user_streams=1)
    admin = Client(app).login()
    first = admin.post("/stream", {"prompt": "silent"})
    assert_refused(admin.post("/generate", {"prompt": "hello"}), 429)
    first.close()
    outcomes = [record["outcome"] for record in records(app.extensions[NAME], "end")]
    assert outcomes == ["rate_limited", "client_gone"]


def test_what_never_reached_the_model_for_its_form_is_not_a_generation(admin: Client, services: Services) -> None:
    assert_refused(admin.post("/generate", {"prompt": "x", "top_p": 9}), 422)
    assert records(services) == []


def test_no_word_of_a_prompt_or_an_answer_is_kept_unless_asked_for(admin: Client, services: Services) -> None:
    canary = "xylophone-canary"
    admin.post("/generate", {"prompt": canary, "stop": ["stop-canary"]}).close()
    admin.post("/login", {"username": "password-canary", "password": canary}).close()
    written = b"".join(file.read_bytes() for file in services.settings.data_dir.rglob("*") if file.is_file())
    assert len(written) > 5000 and b"login refused" in written and b"canary" not in written
