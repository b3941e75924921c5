"""The corpus of RELIABILITY.md, HTTP and login: what a client sends wrong is 4xx, by name, at once."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask

from tests.api.conftest import PASSWORD, Client, assert_refused

MakeApp = Callable[..., Flask]
JSON = "application/json"
DEEP = b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"

# name: (status, bytes, content type, other headers)
HTTP: dict[str, tuple[int, bytes, str | None, dict[str, str]]] = {
    "empty": (400, b"", JSON, {}),
    "cut": (400, b'{"prompt": "hi"', JSON, {}),
    "two values": (400, b'{"prompt": "hi"} {}', JSON, {}),
    "no content type": (415, b'{"prompt": "hi"}', None, {}),
    "text": (415, b'{"prompt": "hi"}', "text/plain", {}),
    "form": (415, b"prompt=hi", "application/x-www-form-urlencoded", {}),
    "json with a suffix": (415, b'{"prompt": "hi"}', "application/json-seq", {}),
    "bad UTF-8": (400, b'{"prompt": "\xff\xfe"}', JSON, {}),
    "UTF-16": (400, '{"prompt": "hi"}'.encode("utf-16"), "application/json; charset=utf-16", {}),
    "byte order mark": (400, b'\xef\xbb\xbf{"prompt": "hi"}', JSON, {}),
    "depth 100,000": (400, DEEP, JSON, {}),
    "depth 40": (400, b'{"prompt": ' + b"[" * 40 + b"]" * 40 + b"}", JSON, {}),
    "5,000 digits": (400, b'{"prompt": "hi", "seed": ' + b"9" * 5000 + b"}", JSON, {}),
    "duplicate keys": (400, b'{"prompt": "a", "prompt": "b"}', JSON, {}),
    "duplicate keys inside": (400, b'{"messages": [{"role": "user", "role": "system", "content": ""}]}', JSON, {}),
    "NaN": (400, b'{"prompt": "hi", "temperature": NaN}', JSON, {}),
    "Infinity": (400, b'{"prompt": "hi", "temperature": -Infinity}', JSON, {}),
    "array": (422, b'[{"prompt": "hi"}]', JSON, {}),
    "null": (422, b"null", JSON, {}),
    "a string of JSON": (422, json.dumps('{"prompt": "hi"}').encode(), JSON, {}),
    "gzip bomb": (415, gzip.compress(b"0" * 10_000_000), JSON, {"Content-Encoding": "gzip"}),
    "too large": (413, b'{"prompt": "' + b"a" * (1 << 20) + b'"}', JSON, {}),
}


@pytest.mark.parametrize("path", ["/generate", "/stream", "/stream/ticket"])
@pytest.mark.parametrize(("status", "body", "kind", "headers"), HTTP.values(), ids=HTTP)
def test_a_body_that_cannot_be_read(
    admin: Client, path: str, status: int, body: bytes, kind: str | None, headers: dict[str, str]
) -> None:
    started = time.monotonic()
    answer = admin.post(path, data=body, content_type=kind, headers=headers)
    assert_refused(answer, status)
    assert time.monotonic() - started < 2


LOGIN: dict[str, tuple[int, dict[str, Any]]] = {
    "1 MB password": (413, {"username": "admin", "password": "x" * (1 << 20)}),
    "long password": (422, {"username": "admin", "password": "x" * 2000}),
    "NUL": (422, {"username": "admin\0", "password": PASSWORD}),
    "NUL in the password": (422, {"username": "admin", "password": PASSWORD + "\0"}),
    "object as name": (422, {"username": {"$ne": ""}, "password": PASSWORD}),
    "list as password": (422, {"username": "admin", "password": [PASSWORD]}),
    "number": (422, {"username": "admin", "password": 12345678}),
    "extra role": (422, {"username": "admin", "password": PASSWORD, "role": "admin"}),
    "no password": (422, {"username": "admin"}),
    "empty": (422, {"username": "", "password": ""}),
}


@pytest.mark.parametrize(("status", "body"), LOGIN.values(), ids=LOGIN)
def test_a_bad_login_is_refused_before_anything_is_hashed(
    nobody: Client, monkeypatch: pytest.MonkeyPatch, status: int, body: dict[str, Any]
) -> None:
    monkeypatch.setattr("security.passwords.Passwords.verify", lambda *_: pytest.fail("hashed"))
    assert_refused(nobody.post("/login", body), status)


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
