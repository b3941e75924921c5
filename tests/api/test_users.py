"""/admin/users and /password, in process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from accounts.credentials import Credentials
from accounts.roles import Role
from accounts.users import User, UserLimits
from api.context import Services
from tests.api.conftest import PASSWORD, Client, assert_refused

HI = {"prompt": "hi there"}
NEW = "another long password"
NO_OWN = {"streams": None, "rpm": None, "tokens_per_day": None}


def patch(admin: Client, name: str, body: dict[str, Any]) -> Any:
    return admin.ask("PATCH", f"/admin/users/{name}", body)


def test_an_admin_adds_reads_changes_and_removes_an_account(admin: Client) -> None:
    added = admin.post("/admin/users", {"username": "bob", "role": "user", "password": PASSWORD})
    assert added.status_code == 201
    bob = {
        "username": "bob",
        "role": "user",
        "disabled": False,
        "own_limits": NO_OWN,
        "limits": {"streams": 10, "rpm": 120, "tokens_per_day": 0},
        "tokens_today": 0,
    }
    assert added.json == {**bob, "password": None}
    assert admin.get("/admin/users/bob").json == bob
    assert [user["username"] for user in admin.get("/admin/users").json["users"]] == ["admin", "bob"]
    bob["tokens_today"] = Client(admin.app).login("bob", PASSWORD).post("/generate", HI).json["usage"]["total_tokens"]
    assert patch(admin, "bob", {"role": "admin"}).json == {**bob, "role": "admin"}
    assert admin.ask("DELETE", "/admin/users/bob").status_code == 204
    assert_refused(admin.get("/admin/users/bob"), 404)
    assert_refused(patch(admin, "bob", {"disabled": True}), 404)
    assert_refused(admin.ask("DELETE", "/admin/users/bob"), 404)


def test_a_password_is_made_up_where_none_is_sent_and_shown_once(admin: Client, nobody: Client) -> None:
    added = admin.post("/admin/users", {"username": "bob"}).json
    assert added["role"] == "user" and len(added["password"]) >= 20
    nobody.login("bob", added["password"])
    assert added["password"] not in admin.get("/admin/users/bob").text + admin.get("/admin/users").text


def test_no_answer_holds_a_hash(admin: Client, services: Services) -> None:
    admin.post("/admin/users", {"username": "bob", "password": PASSWORD})
    answers = admin.get("/admin/users").text + admin.get("/admin/users/bob").text
    assert "argon2" not in answers and "hash" not in answers and services.users.get("bob") is not None


def test_accounts_come_by_the_page(admin: Client, services: Services) -> None:
    for number in range(5):
        services.users.add(f"u{number}", "user", "hash")
    seen, after = [], ""
    while page := admin.get("/admin/users", query_string={"after": after, "limit": 2}).json["users"]:
        assert len(page) <= 2
        seen += [user["username"] for user in page]
        after = seen[-1]
    assert seen == ["admin", "u0", "u1", "u2", "u3", "u4"]


WRONG: dict[str, dict[str, Any]] = {
    "no name": {"role": "user"},
    "an impossible name": {"username": "a/b"},
    "a name that looks like another": {"username": "\u0430dmin"},
    "a trailing newline": {"username": "ann\n"},
    "a number as name": {"username": 5},
    "an unknown role": {"username": "ann", "role": "root"},
    "no role": {"username": "ann", "role": None},
    "a short password": {"username": "ann", "password": "1234567"},
    "a long password": {"username": "ann", "password": "x" * 1025},
    "an unknown field": {"username": "ann", "admin": True},
    "no streams": {"username": "ann", "limits": {"streams": 0}},
    "a limit that is true": {"username": "ann", "limits": {"rpm": True}},
    "fewer tokens than none": {"username": "ann", "limits": {"tokens_per_day": -1}},
    "more tokens than can be counted": {"username": "ann", "limits": {"tokens_per_day": 1 << 53}},
    "an unknown limit": {"username": "ann", "limits": {"wishes": 3}},
}


@pytest.mark.parametrize("body", WRONG.values(), ids=WRONG)
def test_a_wrong_account_is_422_and_not_made(admin: Client, services: Services, body: dict[str, Any]) -> None:
    assert_refused(admin.post("/admin/users", body), 422)
    assert len(services.users.page()) == 1


@pytest.mark.parametrize("body", [{"role": "root"}, {"disabled": "yes"}, {"password": "short"}, {"username": "new"}])
def test_a_wrong_change_is_422_and_not_made(admin: Client, services: Services, body: dict[str, Any]) -> None:
    before = services.users.get("admin")
    assert_refused(patch(admin, "admin", body), 422)
    assert services.users.get("admin") == before


def test_a_taken_name_and_the_last_admin_are_409(admin: Client, services: Services) -> None:
    assert_refused(admin.post("/admin/users", {"username": "admin", "role": "user"}), 409)
    assert_refused(patch(admin, "admin", {"disabled": True}), 409)
    assert_refused(patch(admin, "admin", {"role": "user", "password": NEW}), 409)
    assert_refused(admin.ask("DELETE", "/admin/users/admin"), 409)
    assert services.users.get("admin") is not None and admin.get("/admin/users").status_code == 200


def test_of_one_name_added_32_times_at_once_one_account_comes(admin: Client) -> None:
    def add(_: int) -> int:
        return admin.post("/admin/users", {"username": "bob"}).status_code

    with ThreadPoolExecutor(32) as pool:
        assert sorted(pool.map(add, range(32))) == [201] + [409] * 31


def test_limits_are_changed_one_by_one_and_null_gives_the_roles_back(admin: Client, services: Services) -> None:
    admin.post("/admin/users", {"username": "bob", "limits": {"rpm": 7, "tokens_per_day": 99}})
    assert patch(admin, "bob", {"limits": {"streams": 2, "rpm": None}}).json["own_limits"] == {
        "streams": 2,
        "rpm": None,
        "tokens_per_day": 99,
    }
    assert patch(admin, "bob", {"disabled": False, "role": None}).json["limits"] == {
        "streams": 2,
        "rpm": 120,
        "tokens_per_day": 99,
    }
    assert services.users.get("bob").limits == UserLimits(2, None, 99)


@pytest.mark.promise("P24", injected="each act on accounts, by a user, an auditor and an admin's API key")
@pytest.mark.parametrize("role", [Role.USER, Role.AUDITOR])
def test_only_admins_manage_accounts_and_no_key_does(
    admin: Client, add_user: Callable[..., Client], services: Services, counted: Callable[..., None], role: Role
) -> None:
    other = add_user("ann", role)
    key = Client(admin.app, admin.post("/keys", {"name": "ci"}).json["key"])
    before, answers = [services.users.get(name) for name in ("admin", "ann")], []
    for caller in (other, key):
        answers += [
            caller.get("/admin/users"),
            caller.get("/admin/users/ann"),
            caller.post("/admin/users", {"username": "eve", "role": "admin"}),
            patch(caller, "ann", {"role": "admin"}),
            caller.ask("DELETE", "/admin/users/admin"),
        ]
    after = [services.users.get(name) for name in ("admin", "ann")]
    changed = sum(old != new for old, new in zip(before, after, strict=True))
    counted(refused=sum(answer.status_code == 403 for answer in answers), changed_accounts=changed)
    for answer in answers:
        assert_refused(answer, 403)
    assert changed == 0 and len(services.users.page()) == 2


def test_a_role_that_was_lost_ends_what_it_could_at_once(admin: Client, add_user: Callable[..., Client]) -> None:
    boss = add_user("boss", Role.ADMIN)
    assert boss.get("/admin/users").status_code == 200
    patch(admin, "boss", {"role": "user"})
    assert_refused(boss.get("/admin/users"), 401)
    assert_refused(boss.login("boss").get("/admin/users"), 403)


@pytest.mark.promise("P18", injected="an account disabled and let in again", counted="its old token and key")
def test_what_ended_with_the_rights_does_not_come_back_with_them(
    admin: Client, add_user: Callable[..., Client], counted: Callable[..., None]
) -> None:
    bob = add_user("bob")
    key = Client(bob.app, bob.post("/keys", {"name": "ci"}).json["key"])
    for disabled in (True, False):
        patch(admin, "bob", {"disabled": disabled})
    answers = [caller.post("/generate", HI) for caller in (bob, key)]
    counted(refused=sum(answer.status_code == 401 for answer in answers))
    for answer in answers:
        assert_refused(answer, 401)
    assert bob.login("bob").post("/generate", HI).status_code == 200


@pytest.mark.promise("P18", injected="a new password", counted="the old token and password")
def test_a_password_that_an_admin_sets_ends_the_sessions_of_the_old_one(
    admin: Client, add_user: Callable[..., Client], nobody: Client, counted: Callable[..., None]
) -> None:
    bob = add_user("bob")
    assert patch(admin, "bob", {"password": NEW}).status_code == 200
    answers = [bob.post("/generate", HI), nobody.post("/login", {"username": "bob", "password": PASSWORD})]
    counted(refused=sum(answer.status_code == 401 for answer in answers))
    for answer in answers:
        assert_refused(answer, 401)
    assert nobody.login("bob", NEW).post("/generate", HI).status_code == 200


def change_password(caller: Client, current: str, new: str) -> Any:
    return caller.post("/password", {"current_password": current, "new_password": new})


@pytest.mark.promise("P18", injected="a new password, for each role", counted="earlier tokens and the old password")
@pytest.mark.parametrize("role", list(Role))
def test_everybody_changes_their_own_password_which_ends_every_session(
    nobody: Client, add_user: Callable[..., Client], counted: Callable[..., None], role: Role
) -> None:
    bob = add_user("bob", role)
    login = nobody.post("/login", {"username": "bob", "password": PASSWORD}).json
    answer = change_password(bob, PASSWORD, NEW)
    assert answer.status_code == 200
    old = [
        bob.get("/v1/models"),
        Client(bob.app, login["access_token"]).get("/v1/models"),
        Client(bob.app, login["refresh_token"]).post("/refresh"),
        nobody.post("/login", {"username": "bob", "password": PASSWORD}),
    ]
    counted(refused=sum(each.status_code == 401 for each in old))
    for refused in old:
        assert_refused(refused, 401)
    assert Client(bob.app, answer.json["access_token"]).get("/v1/models").status_code == 200
    assert Client(bob.app, answer.json["refresh_token"]).post("/refresh").status_code == 200


def test_a_password_change_leaves_ones_keys(admin: Client) -> None:
    key = Client(admin.app, admin.post("/keys", {"name": "ci"}).json["key"])
    assert change_password(admin, PASSWORD, NEW).status_code == 200
    assert key.post("/generate", HI).status_code == 200


@pytest.mark.promise("P22", injected="guesses at /password with a valid token")
def test_a_found_token_does_not_change_the_password_nor_guess_it(
    admin: Client, nobody: Client, counted: Callable[..., None]
) -> None:
    guesses = [change_password(admin, "wrong", NEW).status_code for _ in range(6)]
    counted(guesses=guesses.count(401), locked_out=guesses.count(429))
    assert guesses == [401] * 5 + [429]
    assert_refused(change_password(admin, PASSWORD, "short"), 422)
    assert_refused(change_password(nobody, PASSWORD, NEW), 401)
    key = Client(admin.app, admin.post("/keys", {"name": "ci"}).json["key"])
    assert_refused(change_password(key, PASSWORD, NEW), 403)


@pytest.mark.promise("P18", injected="a password changed while the old one is being checked")
def test_a_login_that_races_a_password_change_gets_no_session(
    nobody: Client, services: Services, monkeypatch: pytest.MonkeyPatch, counted: Callable[..., None]
) -> None:
    """The change comes after the old password was found right, before the session is there."""
    start, injected = Credentials.start_session, []

    def start_late(self: Credentials, *args: Any) -> Any:
        injected.append(services.users.change("admin", password_hash=services.passwords.hash(NEW)))
        return start(self, *args)

    monkeypatch.setattr(Credentials, "start_session", start_late)
    answer = nobody.post("/login", {"username": "admin", "password": PASSWORD})
    counted(change=len(injected), refused=int(answer.status_code == 401))
    assert_refused(answer, 401)
    assert len(injected) == 1 and isinstance(injected[0], User)


def test_no_admin_makes_changes_or_removes_an_auditor(
    admin: Client, add_user: Callable[..., Client], services: Services
) -> None:
    add_user("eve", Role.AUDITOR), add_user("bob")
    before = [services.users.get(name) for name in ("eve", "bob")]
    assert_refused(admin.post("/admin/users", {"username": "spy", "role": "auditor"}), 403)
    add_user("second", Role.ADMIN)
    for name in ("bob", "admin"):
        assert_refused(patch(admin, name, {"role": "auditor"}), 403)
    for body in ({"password": NEW}, {"role": "user"}, {"disabled": True}, {"limits": {"rpm": 1}}):
        assert_refused(patch(admin, "eve", body), 403)
    assert_refused(admin.ask("DELETE", "/admin/users/eve"), 403)
    assert [services.users.get(name) for name in ("eve", "bob")] == before and len(services.users.page()) == 4


@pytest.mark.parametrize(
    "password", ["password", "12345678", " " * 8, "Passw0rd", "aaaaaaaa", "Long-Name", "\t \t \t \t "]
)
def test_a_weak_password_is_refused_wherever_one_is_set(admin: Client, services: Services, password: str) -> None:
    refused = admin.post("/admin/users", {"username": "long-name", "password": password})
    assert_refused(refused, 422)
    assert (refused.json["error"]["code"], refused.json["error"]["param"]) == ("weak_password", "password")
    admin.post("/admin/users", {"username": "long-name"})
    assert_refused(patch(admin, "long-name", {"password": password}), 422)
    if password != "Long-Name":
        assert_refused(change_password(admin, PASSWORD, password), 422)
    assert admin.get("/keys").status_code == 200, "the session goes on"


def test_the_next_account_of_a_name_inherits_nothing(admin: Client, add_user: Callable[..., Client]) -> None:
    body = {"prompt": "hello", "temperature": 0}
    first = add_user("ann")
    first.post("/generate", body).close()
    assert first.post("/generate", body).headers["X-Cache"] == "hit"
    key = Client(admin.app, first.post("/keys", {"name": "ci"}).json["key"])
    ticket = first.post("/stream/ticket", HI).json["ticket"]
    admin.ask("DELETE", "/admin/users/ann")
    second = add_user("ann")
    assert second.post("/generate", body).headers["X-Cache"] == "miss"
    assert [caller.get("/v1/models").status_code for caller in (first, key)] == [401, 401]
    assert second.get("/keys").json == {"keys": []}
    assert Client(admin.app).get("/stream", query_string={"ticket": ticket}).status_code == 401
