"""Who reads the audit log, and what they find."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable

import pytest
from flask import Flask

from accounts.roles import Role
from api.context import NAME, Services
from tests.api.audited import PROMPT, records, whole
from tests.api.conftest import Client, assert_refused


@pytest.fixture
def auditor(add_user: Callable[..., Client]) -> Client:
    return add_user("eve", Role.AUDITOR)


def test_contents_are_kept_sealed_and_shown_to_auditors(make_app: Callable[..., Flask]) -> None:
    app = make_app(audit_content=True)
    rooms, admin = app.extensions[NAME], Client(app).login()
    admin.post("/generate", {"prompt": "think " + PROMPT}).close()
    written = b"".join(file.read_bytes() for file in rooms.audit.place.folder.glob("*.jsonl"))
    assert b"sky" not in written
    rooms.users.add("eve", Role.AUDITOR, rooms.users.get("admin").password_hash)
    shown = Client(app).login("eve").get(f"/admin/audit/{records(rooms)[0]['id']}").json
    assert shown["words"]["input"]["raw"] == [["user", "think " + PROMPT]]
    assert shown["words"]["input"]["sanitised"] == [["user", "think why is the sky blue"]]
    assert shown["words"]["output"] == {"answer": "think why is the sky blue", "reasoning": "hm"}
    assert [record["kind"] for record in shown["records"]] == ["start", "end"]
    assert not {"input", "output"} & set(shown["records"][0])


def test_auditors_alone_read_the_log(admin: Client, auditor: Client, add_user: Callable[..., Client]) -> None:
    for caller in (admin, add_user("ann")):
        assert_refused(caller.get("/admin/audit"), 403)
        assert_refused(caller.get("/admin/audit/x"), 403)
    assert auditor.get("/admin/audit").status_code == 200
    assert_refused(auditor.get("/admin/audit/none"), 404)


def test_the_log_is_found_by_filters_and_pages(admin: Client, auditor: Client, add_user: Callable[..., Client]) -> None:
    ann = add_user("ann")
    for caller in (admin, ann, admin):
        caller.post("/generate", {"prompt": "hello"}).close()
    found = auditor.get("/admin/audit?user=admin&kind=end").json
    assert [record["user"] for record in found["records"]] == ["admin", "admin"] and found["next"] is None
    first = auditor.get("/admin/audit?kind=end&limit=2").json
    rest = auditor.get(f"/admin/audit?kind=end&limit=2&before={first['next']}").json
    assert len(first["records"]) == 2 and [record["user"] for record in rest["records"]] == ["admin"]
    assert auditor.get("/admin/audit?kind=end&since=2999-01-01T00:00:00Z").json["records"] == []
    assert len(auditor.get("/admin/audit?kind=end&until=2999-01-01").json["records"]) == 3
    assert_refused(auditor.get("/admin/audit?since=yesterday"), 422)


def test_the_whole_log_is_exported_as_it_is_signed(admin: Client, auditor: Client, rooms: Services) -> None:
    admin.post("/generate", {"prompt": "hello"}).close()
    exported = auditor.get("/admin/audit?format=jsonl")
    files = sorted(rooms.audit.place.folder.glob("*.jsonl"))
    assert exported.data == b"".join(file.read_bytes() for file in files)
    assert exported.headers["Content-Disposition"] == 'attachment; filename="audit.jsonl"'
    rows = list(csv.DictReader(io.StringIO(auditor.get("/admin/audit?format=csv&kind=end").text)))
    assert [(row["user"], row["outcome"]) for row in rows] == [("admin", "stop")]
    assert json.loads(rows[0]["tokens"])["completion"] == 1


def test_what_people_do_to_accounts_sessions_and_the_log_is_on_record(
    admin: Client, auditor: Client, nobody: Client, rooms: Services
) -> None:
    admin.post("/admin/users", {"username": "new", "password": "long enough"}).close()
    admin.ask("DELETE", "/admin/users/new").close()
    key = admin.post("/keys", {"name": "app", "expires_in_days": 1}).json["id"]
    admin.ask("DELETE", f"/keys/{key}").close()
    nobody.post("/login", {"username": "admin", "password": "wrong"}).close()
    nobody.post("/login", {"username": "who is that", "password": "wrong"}).close()
    auditor.get("/admin/audit?user=admin").close()
    admin.post("/logout").close()
    acts = [(record["user"], record["act"]) for record in records(rooms, "act")]
    assert acts == [
        ("admin", "login"),
        ("eve", "login"),
        ("admin", "account added"),
        ("admin", "account removed"),
        ("admin", "key added"),
        ("admin", "key revoked"),
        ("admin", "login refused"),
        (None, "login refused"),
        ("eve", "audit read"),
        ("admin", "logout"),
    ]
    assert whole(rooms)


def test_verifying_from_the_command_line_tells_whole_from_spoiled(app: Flask, admin: Client, rooms: Services) -> None:
    admin.post("/generate", {"prompt": "hello"}).close()
    fine = app.test_cli_runner().invoke(args=["audit", "verify"])
    assert fine.exit_code == 0 and "whole" in fine.output
    file = next(rooms.audit.place.folder.glob("*.jsonl"))
    file.write_bytes(file.read_bytes().replace(b'"user":"admin"', b'"user":"nimda"', 1))
    spoiled = app.test_cli_runner().invoke(args=["audit", "verify"])
    assert spoiled.exit_code == 1 and "was changed" in spoiled.output
