"""Logging in and out, refreshing, API keys and tickets, in process."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jwt
import pytest

from api.context import Services
from errors import StoreUnavailable
from tests.api.audited import records
from tests.api.conftest import PASSWORD, Client, assert_refused
from tests.api.scripted import ScriptedBackend
from tests.api.test_generate import events

HI = {"prompt": "hi there"}
WRONG = (401, "wrong_credentials", "Wrong user name or password.")


def log_in(nobody: Client, name: str = "admin") -> dict[str, Any]:
    return nobody.post("/login", {"username": name, "password": PASSWORD}).json


def with_token(nobody: Client, token: str) -> Client:
    return Client(nobody.app, token)


def test_login_gives_the_contracts_tokens(nobody: Client) -> None:
    tokens = log_in(nobody)
    assert set(tokens) == {"access_token", "refresh_token", "token_type", "expires_in"}
    assert (tokens["token_type"], tokens["expires_in"]) == ("Bearer", 900)
    assert with_token(nobody, tokens["access_token"]).post("/generate", HI).status_code == 200


@pytest.mark.promise("P22", injected="unknown names, look-alikes, wrong passwords")
@pytest.mark.parametrize(
    ("name", "password"),
    [
        ("admin", "wrong password"),
        ("nobody", PASSWORD),
        ("Admin", PASSWORD),
        ("\u0430dmin", PASSWORD),
        ("admin ", PASSWORD),
        ("' OR 1=1 --", PASSWORD),
        ("admin", PASSWORD + " "),
        ("admin", PASSWORD.upper()),
    ],
    ids=ascii,
)
def test_wrong_name_and_wrong_password_are_answered_alike(
    nobody: Client, counted: Callable[..., None], name: str, password: str
) -> None:
    answer = nobody.post("/login", {"username": name, "password": password})
    error = answer.json["error"]
    said = (answer.status_code, error["code"], error["message"])
    counted(equal_answers=int(said == WRONG))
    assert said == WRONG


def test_a_disabled_user_cannot_log_in(nobody: Client, services: Services, add_user: Callable[..., Client]) -> None:
    add_user("bob")
    services.users.change("bob", disabled=True)
    assert nobody.post("/login", {"username": "bob", "password": PASSWORD}).status_code == 401


@pytest.mark.promise("P22", injected="six wrong passwords from one address")
def test_the_sixth_wrong_password_is_429_and_another_address_is_not_locked_out(
    nobody: Client, counted: Callable[..., None]
) -> None:
    body = {"username": "admin", "password": "wrong password"}
    guesses = [nobody.post("/login", body).status_code for _ in range(6)]
    right = {"username": "admin", "password": PASSWORD}
    here = nobody.post("/login", right).status_code
    elsewhere = nobody.post("/login", right, environ_base={"REMOTE_ADDR": "192.0.2.7"}).status_code
    counted(guesses=guesses.count(401), locked_out=[*guesses, here].count(429), let_in=[here, elsewhere].count(200))
    assert (guesses, here, elsewhere) == ([401] * 5 + [429], 429, 200)


@pytest.mark.promise(
    "P22", injected="five wrong passwords by a colleague behind the same address", counted="by a known device"
)
def test_a_device_that_has_logged_in_before_is_let_in_by_its_cookie(
    nobody: Client, counted: Callable[..., None]
) -> None:
    right = {"username": "admin", "password": PASSWORD}
    name, value = nobody.post("/login", right).headers["Set-Cookie"].partition(";")[0].split("=")
    for _ in range(5):
        nobody.post("/login", {"username": "admin", "password": "wrong password"})
    cookies = ("", f"{name}={value}", f"{name}={value}x")
    unknown, known, forged = (nobody.post("/login", right, headers={"Cookie": cookie}) for cookie in cookies)
    statuses = [answer.status_code for answer in (unknown, known, forged)]
    counted(let_in=statuses.count(200), locked_out=statuses.count(429))
    assert known.status_code == 200
    assert_refused(unknown, 429)
    assert_refused(forged, 429)


@pytest.mark.parametrize(("host", "secure"), [("localhost", False), ("127.0.0.1:5000", False), ("[::1]:1", False)])
def test_the_devices_cookie_is_closed_to_scripts_and_other_sites(nobody: Client, host: str, secure: bool) -> None:
    answer = nobody.post("/login", {"username": "admin", "password": PASSWORD}, headers={"Host": host})
    attributes = {part.strip() for part in answer.headers["Set-Cookie"].split(";")[1:]}
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= attributes and ("Secure" in attributes) is secure
    assert "admin" not in answer.headers["Set-Cookie"]


def test_elsewhere_the_devices_cookie_travels_encrypted_only(make_app: Callable[..., Any]) -> None:
    nobody = Client(make_app(allowed_hosts=("llm.example.org",)))
    login = {"username": "admin", "password": PASSWORD}
    assert "Secure" in nobody.post("/login", login, headers={"Host": "llm.example.org"}).headers["Set-Cookie"]


def test_refused_logins_are_on_record_and_a_flood_of_them_once_a_minute(nobody: Client, services: Services) -> None:
    for _ in range(20):
        nobody.post("/login", {"username": "admin", "password": "wrong password"})
    assert [each["code"] for each in records(services, "login refused")] == ["wrong_credentials"] * 5 + ["rate_limited"]


def test_the_record_tells_which_key_acted(admin: Client, services: Services) -> None:
    made = admin.post("/keys", {"name": "ci"}).json
    Client(admin.app, made["key"]).post("/generate", HI).close()
    (start,) = records(services, "start")
    assert (start["user"], start["key"], start["user_id"]) == ("admin", made["id"], services.users.get("admin").id)


@pytest.mark.promise("P22", injected="a new X-Forwarded-For for each guess")
def test_a_forged_forwarded_address_does_not_give_more_guesses(nobody: Client, counted: Callable[..., None]) -> None:
    body = {"username": "admin", "password": "wrong password"}
    tries = [nobody.post("/login", body, headers={"X-Forwarded-For": f"192.0.2.{n}"}).status_code for n in range(6)]
    counted(guesses=tries.count(401), locked_out=tries.count(429))
    assert tries == [401] * 5 + [429]


def test_behind_a_trusted_proxy_the_forwarded_address_counts(make_app: Callable[..., Any]) -> None:
    nobody = Client(make_app(trusted_proxies=1))
    body = {"username": "admin", "password": "wrong password"}
    tries = [nobody.post("/login", body, headers={"X-Forwarded-For": f"192.0.2.{n}"}).status_code for n in range(6)]
    assert tries == [401] * 6


@pytest.mark.promise("P18", injected="a refresh token used twice")
def test_refresh_rotates_and_a_reused_token_ends_the_family(nobody: Client, counted: Callable[..., None]) -> None:
    first = log_in(nobody)
    second = with_token(nobody, first["refresh_token"]).post("/refresh").json
    assert with_token(nobody, second["access_token"]).get("/keys").status_code == 200
    refreshed = [with_token(nobody, each["refresh_token"]).post("/refresh").status_code for each in (first, second)]
    statuses = [*refreshed, with_token(nobody, second["access_token"]).get("/keys").status_code]
    counted(refused_tokens=statuses.count(401))
    assert statuses == [401] * 3


@pytest.mark.promise("P18", injected="one refresh token sent twice at once")
def test_of_two_refreshes_at_once_one_succeeds(nobody: Client, counted: Callable[..., None]) -> None:
    for _ in range(5):
        holder = with_token(nobody, log_in(nobody)["refresh_token"])
        with ThreadPoolExecutor(2) as pool:
            statuses = sorted(pool.map(lambda _, who=holder: who.post("/refresh").status_code, range(2)))
        counted(refreshed=statuses.count(200), refused=statuses.count(401))
        assert statuses == [200, 401]


def test_refresh_and_access_tokens_do_not_stand_in_for_each_other(nobody: Client) -> None:
    tokens = log_in(nobody)
    assert with_token(nobody, tokens["access_token"]).post("/refresh").status_code == 401
    assert with_token(nobody, tokens["refresh_token"]).get("/keys").status_code == 401


def test_logging_out_ends_this_session_only(nobody: Client) -> None:
    mine, other = log_in(nobody), log_in(nobody)
    assert with_token(nobody, mine["access_token"]).post("/logout").status_code == 204
    assert with_token(nobody, mine["access_token"]).get("/keys").status_code == 401
    assert with_token(nobody, mine["refresh_token"]).post("/refresh").status_code == 401
    assert with_token(nobody, other["access_token"]).get("/keys").status_code == 200


def test_a_key_works_until_it_is_revoked_and_is_shown_once(admin: Client) -> None:
    made = admin.post("/keys", {"name": "ci", "expires_in_days": 7})
    assert made.status_code == 201
    key = Client(admin.app, made.json["key"])
    assert key.post("/generate", HI).status_code == 200
    (listed,) = admin.get("/keys").json["keys"]
    assert listed == {name: value for name, value in made.json.items() if name != "key"}
    assert round(listed["expires_at"] - listed["created_at"]) == 7 * 86_400
    assert admin.ask("DELETE", f"/keys/{listed['id']}").status_code == 204
    assert key.post("/generate", HI).status_code == 401
    assert admin.get("/keys").json == {"keys": []}
    assert admin.ask("DELETE", f"/keys/{listed['id']}").status_code == 404


def test_a_key_makes_no_keys_and_nobody_revokes_anothers(admin: Client, add_user: Callable[..., Client]) -> None:
    made = admin.post("/keys", {"name": "ci"}).json
    assert Client(admin.app, made["key"]).post("/keys", {"name": "more"}).status_code == 403
    assert add_user("eve").ask("DELETE", f"/keys/{made['id']}").status_code == 404


@pytest.mark.promise("P18", injected="their owner disabled, demoted or deleted", counted="of token, key and ticket")
@pytest.mark.parametrize("change", ["disable", "demote", "delete"])
def test_tokens_keys_and_tickets_die_with_their_owners_rights(
    services: Services, add_user: Callable[..., Client], counted: Callable[..., None], change: str
) -> None:
    bob = add_user("bob")
    key = Client(bob.app, bob.post("/keys", {"name": "ci"}).json["key"])
    ticket = bob.post("/stream/ticket", HI).json["ticket"]
    if change == "disable":
        services.users.change("bob", disabled=True)
    elif change == "demote":
        services.users.change("bob", role="auditor")
    else:
        services.users.delete("bob")
    answers = [
        bob.post("/generate", HI),
        key.post("/generate", HI),
        Client(bob.app).get("/stream", query_string={"ticket": ticket}),
    ]
    statuses = [answer.status_code for answer in answers]
    counted(refused=statuses.count(401))
    assert statuses == [401] * 3


@pytest.mark.promise("P18", injected="a state store that fails")
def test_when_the_store_does_not_answer_nobody_gets_in(
    admin: Client, backend: ScriptedBackend, monkeypatch: pytest.MonkeyPatch, counted: Callable[..., None]
) -> None:
    def broken(*_: object) -> None:
        raise StoreUnavailable("the database does not answer (SQLITE_IOERR)")

    monkeypatch.setattr("db.Database.reading", broken)
    answer = admin.post("/generate", HI)
    counted(refused=int(answer.status_code == 503), generations=len(backend.submitted))
    assert (answer.status_code, answer.json["error"]["code"]) == (503, "store_unavailable")
    assert "SQLITE" not in answer.text and backend.submitted == []


def test_a_ticket_opens_its_stream_once(
    admin: Client, nobody: Client, backend: ScriptedBackend, services: Services
) -> None:
    made = admin.post("/stream/ticket", {**HI, "max_new_tokens": 1})
    assert made.json["expires_in"] == 60
    stream = nobody.get("/stream", query_string={"ticket": made.json["ticket"]})
    assert [name for name, _ in events(stream.text)] == ["message", "done"]
    assert (backend.submitted[0].owner, backend.submitted[0].max_new_tokens) == (services.users.get("admin").id, 1)
    again = nobody.get("/stream", query_string={"ticket": made.json["ticket"]})
    assert (again.status_code, again.text) == (204, "")
    assert len(backend.submitted) == 1


@pytest.mark.promise("P18", injected="a logout after the ticket was made")
def test_a_ticket_dies_with_the_session_that_made_it(
    admin: Client, nobody: Client, counted: Callable[..., None]
) -> None:
    ticket = admin.post("/stream/ticket", HI).json["ticket"]
    admin.post("/logout")
    status = nobody.get("/stream", query_string={"ticket": ticket}).status_code
    counted(refused_ticket=int(status == 401))
    assert status == 401


def test_an_old_ticket_is_no_ticket(admin: Client, nobody: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.routes.generate.TICKET_SECONDS", -1)
    ticket = admin.post("/stream/ticket", HI).json["ticket"]
    assert nobody.get("/stream", query_string={"ticket": ticket}).status_code == 204


def test_a_tickets_body_is_checked_when_it_is_made(admin: Client) -> None:
    assert admin.post("/stream/ticket", {"prompt": ""}).status_code == 422


def test_a_ticket_never_outlives_its_callers_token(
    admin: Client, nobody: Client, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    claims = jwt.decode(admin.token or "", options={"verify_signature": False})
    short = Client(admin.app, jwt.encode({**claims, "exp": int(time.time()) + 10}, services.policy.key, "HS256"))
    now = time.time
    for caller, status in ((short, 204), (admin, 200)):
        ticket = caller.post("/stream/ticket", HI).json["ticket"]
        with monkeypatch.context() as later:
            later.setattr(time, "time", lambda: now() + 11)
            assert nobody.get("/stream", query_string={"ticket": ticket}).status_code == status


def test_no_ticket_is_written_to_disk(admin: Client, services: Services) -> None:
    before = sum(file.stat().st_size for file in services.settings.data_dir.rglob("*") if file.is_file())
    for _ in range(10):
        admin.post("/stream/ticket", {"prompt": "private " * 5000})
    files = [file.read_bytes() for file in services.settings.data_dir.rglob("*") if file.is_file()]
    assert sum(map(len, files)) - before < 100_000 and not any(b"private" in content for content in files)


def test_tickets_are_bounded_in_size_and_number(admin: Client, nobody: Client) -> None:
    assert_refused(admin.post("/stream/ticket", {"prompt": "x" * (64 << 10)}), 413)
    made = [admin.post("/stream/ticket", HI) for _ in range(17)]
    assert [answer.status_code for answer in made] == [200] * 16 + [429]
    assert int(made[-1].headers["Retry-After"]) == 60
    nobody.get("/stream", query_string={"ticket": made[0].json["ticket"]}).close()
    assert admin.post("/stream/ticket", HI).status_code == 200, "a used one leaves its place"


def test_nobody_collects_keys_or_refreshes_without_end(
    admin: Client, nobody: Client, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accounts.credentials.MAX_KEYS", 2)
    first = admin.post("/keys", {"name": "a"}).json
    assert admin.post("/keys", {"name": "b"}).status_code == 201
    assert_refused(admin.post("/keys", {"name": "c"}), 422)
    admin.ask("DELETE", f"/keys/{first['id']}")
    assert admin.post("/keys", {"name": "c"}).status_code == 201

    token = nobody.post("/login", {"username": "admin", "password": PASSWORD}).json["refresh_token"]
    for _ in range(services.settings.user_rpm):
        answer = Client(nobody.app, token).post("/refresh")
        if answer.status_code == 429:
            break
        token = answer.json["refresh_token"]
    assert_refused(Client(nobody.app, token).post("/refresh"), 429)


@pytest.mark.parametrize("refused_for", [{"Host": "evil.example"}, {"Content-Length": "70000"}])
def test_a_clients_word_never_becomes_a_label(nobody: Client, refused_for: dict[str, str]) -> None:
    nobody.ask("QXZ", "/login", headers=refused_for)
    page = nobody.get("/metrics").text
    assert "llm_slots" in page and "QXZ" not in page
