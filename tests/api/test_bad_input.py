"""What the corpus cannot say of bad input: other settings, and what was not done before it was refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from flask import Flask

from tests.api.conftest import Client, assert_refused
from tests.api.corpus import Case, cases, grown, joined

MakeApp = Callable[..., Flask]
JSON = "application/json"


@pytest.mark.promise("P1", injected="each bad login of the corpus")
@pytest.mark.parametrize(
    "case", [case for case in cases("login") if case.status in (413, 422)], ids=lambda case: case.name
)
def test_a_bad_login_is_refused_before_anything_is_hashed(
    admin: Client, monkeypatch: pytest.MonkeyPatch, counted: Callable[..., None], case: Case
) -> None:
    hashed: list[object] = []
    monkeypatch.setattr("accounts.passwords.Passwords.verify", lambda *given: bool(hashed.append(given)))
    request = case.request
    body = (
        {"json": grown(request["json"])}
        if "json" in request
        else {"data": joined(request["pieces"]), "content_type": JSON}
    )
    answer = admin.post(request["path"], **body)
    counted(refused=int(answer.status_code == case.status), hashed_passwords=len(hashed))
    assert_refused(answer, int(str(case.status)))
    assert hashed == []


def test_a_password_sized_body_is_all_that_login_reads(nobody: Client) -> None:
    assert_refused(nobody.post("/login", data=b" " * (65 << 10), content_type=JSON), 413)


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:5000"])
@pytest.mark.parametrize("own", ["127.0.0.1", "localhost", "::1"])
def test_on_loopback_another_host_name_is_refused(make_app: MakeApp, own: str, host: str) -> None:
    assert_refused(Client(make_app(host=own)).get("/healthz", headers={"Host": host}), 400)


@pytest.mark.parametrize("host", ["localhost", "localhost:5000", "127.0.0.1:5000", "[::1]:5000", "192.168.1.5"])
def test_addresses_and_localhost_are_always_served(nobody: Client, host: str) -> None:
    assert nobody.get("/healthz", headers={"Host": host}).status_code == 200


def test_listed_hosts_are_served_and_only_they(make_app: MakeApp) -> None:
    nobody = Client(make_app(allowed_hosts=("llm.example.org",), trusted_proxies=1))
    assert nobody.get("/healthz", headers={"Host": "llm.example.org"}).status_code == 200
    assert nobody.get("/healthz", headers={"Host": "other.example.org"}).status_code == 400


@pytest.mark.parametrize("method", ["TRACE", "PUT", "PATCH", "DELETE"])
def test_other_methods_are_405(admin: Client, method: str) -> None:
    answer = admin.ask(method, "/generate")
    assert answer.status_code == 405 and "POST" in answer.headers["Allow"]


@pytest.mark.parametrize(
    "path", ["/%2e%2e/settings.py", "/docs/../../settings.py", "/docs/%2e%2e/guards.py", "/nowhere"]
)
def test_there_is_nothing_to_climb_to(nobody: Client, path: str) -> None:
    assert nobody.get(path).status_code == 404


@pytest.mark.parametrize("offered", ["a\tb", "x" * 65, "ü", "a b", ""])
def test_a_request_id_that_is_not_plain_is_replaced(nobody: Client, offered: str) -> None:
    given = nobody.get("/healthz", headers={"X-Request-Id": offered.encode().decode("latin-1")}).headers["X-Request-Id"]
    assert given != offered and given.isalnum()
    assert nobody.get("/healthz", headers={"X-Request-Id": "a-b_c.9"}).headers["X-Request-Id"] == "a-b_c.9"


@pytest.mark.parametrize("forwarded", ["garbage", "127.0.0.1, evil", "127.0.0.1:5000"])
def test_metrics_are_not_for_an_address_that_is_none(make_app: MakeApp, forwarded: str) -> None:
    behind = Client(make_app(trusted_proxies=1))
    assert_refused(behind.get("/metrics", headers={"X-Forwarded-For": forwarded}), 403)
