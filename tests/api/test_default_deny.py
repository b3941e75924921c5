"""Who may reach which route: every rule of the URL map, for every kind of caller."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from flask import Flask

from accounts.roles import Permission, Role, allowed
from api.context import NAME
from tests.api.conftest import Client
from tests.api.scripted import ScriptedBackend

PUBLIC = {
    ("GET", "/"),
    ("GET", "/sw.js"),
    ("GET", "/web/<path:name>"),
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("POST", "/login"),
    ("POST", "/refresh"),
    ("GET", "/docs"),
    ("GET", "/docs/<name>"),
    ("GET", "/openapi.json"),
    ("GET", "/metrics"),
    ("GET", "/stream"),
}


def routes(app: Flask) -> Iterator[tuple[str, str, object]]:
    for rule in app.url_map.iter_rules():
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}:
            yield method, rule.rule, app.view_functions[rule.endpoint]


@pytest.mark.promise("P24", injected="nothing", counted="every rule of the URL map")
def test_exactly_the_listed_routes_are_public_and_every_other_names_its_permission(
    app: Flask, counted: Callable[..., None]
) -> None:
    named = [view for _, _, view in routes(app) if isinstance(getattr(view, "permission", None), Permission)]
    public = [view for _, _, view in routes(app) if getattr(view, "public", False)]
    counted(rules=len(list(routes(app))), public=len(public), with_a_permission=len(named))
    for method, rule, view in routes(app):
        is_public = (method, rule) in PUBLIC
        assert getattr(view, "public", False) is is_public, (method, rule)
        assert is_public or isinstance(getattr(view, "permission", None), Permission), (method, rule)
    assert {(method, rule) for method, rule, _ in routes(app)} > PUBLIC


def path_of(rule: str) -> str:
    return rule.replace("<path:id>", "x").replace("<path:name>", "x").replace("<id>", "x").replace("<name>", "docs.js")


@pytest.mark.promise("P24", injected="the URL map x nobody, admin, user, auditor", counted="just where the table says")
@pytest.mark.parametrize("role", [None, *Role])
def test_the_url_map_lets_in_whom_the_table_says(
    app: Flask, nobody: Client, add_user: Callable[..., Client], counted: Callable[..., None], role: Role | None
) -> None:
    statuses = Counter[int]()
    if role:
        add_user(f"some-{role}", role)
    for method, rule, view in routes(app):
        caller = nobody.login(f"some-{role}") if role else nobody  # anew each time: one of the routes logs out
        status = caller.ask(method, path_of(rule)).status_code
        statuses[status] += 1
        if (method, rule) in PUBLIC:
            assert status != 403 and (status != 401 or rule == "/refresh"), (method, rule, status)
        elif role is None:
            assert status == 401, (method, rule, status)
        else:
            let_in = allowed(role, view.permission)
            assert (status not in {401, 403}) is let_in, (method, rule, status)
    counted(requests=statuses.total(), without_a_token=statuses[401], without_permission=statuses[403])


OWNED = {("DELETE", "/keys/<id>"), ("DELETE", "/requests/<id>"), ("GET", "/stream")}
# Roles decide there, or nobody has to.
NOBODYS = {"/v1/models/<path:id>", "/docs/<name>", "/admin/users/<name>", "/admin/audit/<id>", "/web/<path:name>"}


@pytest.mark.promise(
    "P24",
    injected="another user's key, request and ticket",
    counted="an admin may cancel; a stream is its ticket's owner's",
)
@pytest.mark.parametrize("role", [Role.USER, Role.ADMIN])
def test_what_belongs_to_a_user_is_out_of_reach_for_every_other(
    app: Flask, add_user: Callable[..., Client], backend: ScriptedBackend, counted: Callable[..., None], role: Role
) -> None:
    named = {(method, rule) for method, rule, _ in routes(app) if "<" in rule and rule not in NOBODYS}
    assert named | {("GET", "/stream")} == OWNED, "a new route names a thing: whose is it?"
    ann, eve = add_user("ann"), add_user("eve", role)
    key = ann.post("/keys", {"name": "ci"}).json
    ticket = ann.post("/stream/ticket", {"prompt": "hi"}).json["ticket"]
    with ann.post("/stream", {"prompt": "silent"}, headers={"X-Request-Id": "anns"}) as stream:
        statuses = [eve.ask("DELETE", path).status_code for path in (f"/keys/{key['id']}", "/requests/anns")]
        counted(not_found=statuses.count(404), cancelled=statuses.count(204))
        assert statuses == [404, 204 if role is Role.ADMIN else 404]
        assert eve.get("/keys").json == {"keys": []}
        assert stream.status_code == 200 and len(backend.submitted) == 1
        assert Client(app, key["key"]).get("/v1/models").status_code == 200
    with eve.get("/stream", query_string={"ticket": ticket}):
        owner = app.extensions[NAME].users.get("ann").id
        assert backend.submitted[-1].owner == owner, "a ticket spoke for whoever carried it"


@pytest.mark.promise("P24", injected="a route that names no permission", counted="an admin too")
def test_a_route_that_says_nothing_is_denied_to_everybody(
    app: Flask, admin: Client, nobody: Client, counted: Callable[..., None]
) -> None:
    app.view_functions["forgotten"] = lambda: "open"
    app.url_map.add(app.url_rule_class("/forgotten", endpoint="forgotten"))
    statuses = [caller.get("/forgotten").status_code for caller in (nobody, admin)]
    counted(refused=statuses.count(401) + statuses.count(403))
    assert statuses == [401, 403]


def test_options_and_head_need_a_token_too(nobody: Client) -> None:
    assert nobody.ask("OPTIONS", "/generate").status_code == 401
    assert nobody.ask("HEAD", "/keys").status_code == 401


def test_an_auditor_sees_which_model_is_served_and_generates_nothing(add_user: Callable[..., Client]) -> None:
    auditor = add_user("ann", Role.AUDITOR)
    assert auditor.get("/v1/models").status_code == 200
    assert auditor.post("/generate", {"prompt": "hi"}).status_code == 403


@pytest.mark.parametrize(
    ("address", "status"),
    [
        ("127.0.0.9", 200),
        ("::1", 200),
        ("::ffff:127.0.0.1", 200),
        ("10.1.2.3", 200),
        ("::ffff:10.1.2.3", 200),
        ("10.2.0.1", 403),
        ("172.18.0.4", 403),
        ("8.8.8.8", 403),
        ("", 403),
    ],
)
def test_metrics_are_for_this_machine_and_the_networks_listed(
    make_app: Callable[..., Flask], address: str, status: int
) -> None:
    nobody = Client(make_app(metrics_networks="10.1.0.0/16"))
    assert nobody.get("/metrics", environ_base={"REMOTE_ADDR": address}).status_code == status


def test_metrics_are_for_no_network_by_default(nobody: Client) -> None:
    assert nobody.get("/metrics", environ_base={"REMOTE_ADDR": "10.1.2.3"}).status_code == 403
