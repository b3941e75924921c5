"""What nginx does by itself: TLS, limits, headers, and errors in the app's own shape."""

from __future__ import annotations

import http.client
import json
import os
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from ops.stack import ROOT, Stack, StackError, free_port, listening, make_secrets, nginx_command, nginx_conf
from tests.stack.client import Answer, Door, until
from tests.stack.conftest import need

IPV6 = Path("/proc/net/if_inet6")  # an address a line; missing where the kernel has no IPv6


def refused(answer: Answer, status: int, code: str) -> None:
    """The answer is this error, in the shape of api/errors.py, and it can be found in the log."""
    assert (answer.status, answer.headers["Content-Type"]) == (status, "application/json")
    assert set(answer.json["error"]) == {"message", "type", "code", "param", "request_id"}
    assert answer.json["error"]["code"] == code


def test_an_app_that_is_down_is_a_503_that_says_when_to_come_back(closed_door: Door) -> None:
    answer = closed_door.ask("POST", "/generate", {"prompt": "hello"})
    refused(answer, 503, "unavailable")
    assert answer.headers["Retry-After"] == "5"


def test_under_v1_the_error_has_openai_s_keys_only(closed_door: Door) -> None:
    assert set(closed_door.ask("GET", "/v1/models").json["error"]) == {"message", "type", "code", "param"}


@pytest.mark.parametrize("path", ["/metrics", "/metrics/", "//metrics", "/%6detrics", "/x/../metrics", "/metrics?a=b"])
def test_metrics_are_not_for_the_outside(closed_door: Door, path: str) -> None:
    refused(closed_door.ask("GET", path), 404, "not_found")


@pytest.mark.parametrize("path", ["/%00", "/.%2e/x", "/../x", "/%", "/a%zz", "/v1/%00/x"])
def test_a_malformed_address_is_a_400_and_no_500(closed_door: Door, path: str) -> None:
    answer = closed_door.ask("GET", path)
    assert (answer.status, answer.headers["Content-Type"]) == (400, "application/json")
    assert answer.json["error"]["code"] == "malformed"
    assert ("request_id" in answer.json["error"]) is not path.startswith("/v1/")


def test_plain_http_is_sent_to_https_with_its_method(closed_door: Door) -> None:
    with closing(http.client.HTTPConnection("127.0.0.1", closed_door.stack.http, timeout=10)) as connection:
        connection.request("POST", "/generate?x=1", b"{}", {"Host": "llm.example.org:80"})
        with connection.getresponse() as response:
            assert (response.status, response.headers["Location"]) == (308, "https://llm.example.org/generate?x=1")


@pytest.mark.parametrize(("version", "accepted"), [(ssl.TLSVersion.TLSv1_3, True), (ssl.TLSVersion.TLSv1_2, False)])
def test_only_tls_1_3_gets_in(closed_door: Door, version: ssl.TLSVersion, accepted: bool) -> None:
    with closing(closed_door.connect(tls=version)) as connection:
        try:
            connection.connect()
            assert accepted
        except ssl.SSLError as error:
            assert not accepted and "ALERT_PROTOCOL_VERSION" in str(error)


def test_a_body_over_the_limit_is_a_413(closed_door: Door) -> None:
    refused(closed_door.ask("POST", "/generate", b"x" * ((1 << 20) + 1)), 413, "too_large")


def test_a_chunked_body_over_the_limit_is_a_413_too(closed_door: Door) -> None:
    refused(closed_door.ask("POST", "/generate", [b"x" * (1 << 18)] * 5), 413, "too_large")


def test_headers_of_40_kb_are_refused(closed_door: Door) -> None:
    refused(closed_door.ask("GET", "/", headers={"X-Long": "x" * 40_000}), 431, "too_large")


def test_the_sixth_login_in_a_row_waits_and_another_address_does_not(closed_door: Door) -> None:
    def login(address: str) -> Answer:
        return closed_door.ask("POST", "/login", {"username": "admin", "password": "guess"}, address=address)

    assert [login("127.0.0.2").status for _ in range(5)] == [503] * 5
    answer = login("127.0.0.2")
    refused(answer, 429, "rate_limited")
    assert answer.headers["Retry-After"] == "12"
    assert login("127.0.0.3").status == 503


def test_a_flood_from_one_address_is_shed(closed_door: Door) -> None:
    def status(connection: http.client.HTTPConnection) -> int:
        connection.request("GET", "/")
        with connection.getresponse() as response:
            response.read()
            return response.status

    with closing(closed_door.connect("127.0.0.4")) as connection:
        statuses = [status(connection) for _ in range(400)]
    assert statuses[:101] == [503] * 101 and set(statuses[101:]) == {503, 429}


def test_every_answer_has_the_headers_of_a_page_that_runs_nothing_from_elsewhere(closed_door: Door) -> None:
    headers = closed_door.ask("GET", "/anything").headers
    assert headers["Strict-Transport-Security"] == "max-age=31536000"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Content-Security-Policy"].startswith("default-src 'none'; ")
    assert headers["Server"] == "nginx"


def test_a_plain_request_id_is_kept_and_any_other_replaced(closed_door: Door) -> None:
    def request_id(offered: str) -> str:
        return closed_door.ask("GET", "/", headers={"X-Request-Id": offered}).json["error"]["request_id"]

    assert request_id("order-66.a_B") == "order-66.a_B"
    assert len(request_id('"},{"x')) == 32


@pytest.fixture
def strict_door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Door]:
    """nginx as an operator sets it, in a folder whose name has a space."""
    need("nginx", "openssl")
    monkeypatch.setenv("LOGIN_RATE", "60r/m")
    monkeypatch.setenv("API_RATE", "1r/s")
    monkeypatch.setenv("URL_PREFIX", "/llm")
    folder = tmp_path / "my stack"
    with (tmp_path / "log").open("wb") as log, Stack(folder, {}, free_port(), log, parts=["nginx"]) as stack:
        yield Door(stack)


def test_rates_and_prefix_are_settings(strict_door: Door) -> None:
    refused(strict_door.ask("GET", "/llm/metrics"), 404, "not_found")
    assert set(strict_door.ask("GET", "/llm/v1/models").json["error"]) == {"message", "type", "code", "param"}
    statuses = [strict_door.ask("GET", "/healthz").status for _ in range(110)]
    assert 429 in statuses[95:]
    logins = [strict_door.ask("POST", "/llm/login", b"{}", address="127.0.0.5").status for _ in range(6)]
    assert logins[:5] == [503] * 5 and logins[5] == 429
    until(lambda: strict_door.ask("POST", "/llm/login", b"{}", address="127.0.0.5").status == 503, seconds=4)


@pytest.mark.skipif("lo" not in IPV6.read_text().split() if IPV6.exists() else True, reason="no IPv6 on loopback")
def test_a_bare_port_serves_both_families_and_sees_the_clients_own_addresses(tmp_path: Path) -> None:
    need("nginx", "openssl")
    make_secrets(tmp_path / "secrets")
    places = {
        "HTTPS_LISTEN": str(free_port()),
        "HTTP_LISTEN": str(port := free_port()),
        "SECRETS": f"{tmp_path}/secrets",
    }
    command = [ROOT / "ops/nginx-conf", ROOT / "nginx.conf"]
    conf = subprocess.run(command, env={**os.environ, **places, "APP": "127.0.0.1:1"}, capture_output=True, check=True)
    (tmp_path / "nginx.conf").write_bytes(conf.stdout)
    with subprocess.Popen(nginx_command(tmp_path), stdout=subprocess.PIPE, text=True) as nginx:
        try:
            until(lambda: listening(port))
            for address in ("127.0.0.1", "::1"):
                with closing(http.client.HTTPConnection(address, port, timeout=10)) as connection:
                    connection.request("GET", "/")
                    assert connection.getresponse().status == 308
        finally:
            nginx.terminate()
        assert [json.loads(line)["address"] for line in nginx.stdout or ()] == ["127.0.0.1", "::1"]


@pytest.mark.parametrize(
    ("name", "value"), [("LOGIN_RATE", "5"), ("API_RATE", "1r/s; return 200"), ("URL_PREFIX", "llm/")]
)
def test_a_wrong_rate_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(StackError, match=f"^.*{name}.* such as .*$"):
        nginx_conf(tmp_path, 1, 2, 3)
