"""Who reads the audit log, and what they find."""

from __future__ import annotations

import copy
import csv
import io
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from flask import Flask

from accounts.roles import Role
from api.context import NAME, Services
from audit.log import AuditFilter, AuditLog
from crypto import KeyRing
from db import Database
from tests.api.audited import PROMPT, records, whole
from tests.api.conftest import PASSWORD, Client, assert_refused
from tests.api.server import ROOT, Server
from tests.audit.logs import find


@pytest.fixture
def auditor(add_user: Callable[..., Client]) -> Client:
    return add_user("eve", Role.AUDITOR)


def test_contents_are_kept_sealed_and_shown_to_auditors(make_app: Callable[..., Flask]) -> None:
    app = make_app(audit_content=True)
    services, admin = app.extensions[NAME], Client(app).login()
    admin.post("/generate", {"prompt": "think " + PROMPT}).close()
    written = b"".join(file.read_bytes() for file in services.settings.data_dir.glob("service.sqlite3*"))
    assert PROMPT.encode() not in written and b"sky" not in written and b"input_sha256" in written
    services.users.add("eve", Role.AUDITOR, services.users.get("admin").password_hash)
    shown = Client(app).login("eve").get(f"/admin/audit/{records(services)[0]['id']}").json
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
    rest = auditor.get(f"/admin/audit?kind=end&limit=2&after={first['next']}").json
    assert len(first["records"]) == 2 and [record["user"] for record in rest["records"]] == ["admin"]
    assert rest["next"] is None
    request = first["records"][0]["request"]
    assert [each["kind"] for each in auditor.get(f"/admin/audit?request={request}").json["records"]] == ["end", "start"]
    assert auditor.get("/admin/audit?kind=end&since=2999-01-01T00:00:00Z").json["records"] == []
    assert len(auditor.get("/admin/audit?kind=end&until=2999-01-01").json["records"]) == 3
    assert_refused(auditor.get("/admin/audit?since=yesterday"), 422)


def test_the_whole_log_is_exported_as_it_is_signed(admin: Client, auditor: Client, services: Services) -> None:
    admin.post("/generate", {"prompt": "hello"}).close()
    with auditor.get("/admin/audit?format=jsonl") as exported:
        lines = exported.data.splitlines()
    assert [re.sub(rb',"mac":"[0-9a-f]{64}"}$', b"}", line) for line in lines] == [
        row.body for row in services.audit.find(AuditFilter(), 1000, newest_first=False)
    ]
    assert exported.headers["Content-Disposition"] == 'attachment; filename="audit.jsonl"'
    with auditor.get(f"/admin/audit?format=jsonl&after={len(lines) - 1}") as rest:
        assert json.loads(rest.data.splitlines()[0])["seq"] == len(lines)
    with auditor.get("/admin/audit?format=csv&kind=end") as ends:
        rows = list(csv.DictReader(io.StringIO(ends.text)))
    assert [(row["user"], row["outcome"]) for row in rows] == [("admin", "stop")]
    assert json.loads(rows[0]["tokens"])["completion"] == 1


@pytest.mark.parametrize("cell", ["=HYPERLINK(1)", "+1", "-1", "@x", "\t=1", "\r=1"])
def test_no_cell_of_an_export_is_a_formula(admin: Client, auditor: Client, cell: str) -> None:
    admin.post("/generate", {"prompt": "hello", "model": cell}).close()
    with auditor.get("/admin/audit?format=csv&kind=start") as exported:
        assert next(csv.DictReader(io.StringIO(exported.text, newline="")))["model"] == f"'{cell}"


def test_an_export_is_bounded_in_records_and_time(
    auditor: Client, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    services.audit.append(*({"kind": "said"} for _ in range(50)))
    monkeypatch.setattr("api.routes.audit._PAGE", 7)
    monkeypatch.setattr("api.routes.audit._EXPORTED", 20)
    with auditor.get("/admin/audit?format=jsonl") as part:
        assert [json.loads(line)["seq"] for line in part.data.splitlines()] == list(range(1, 21))
    monkeypatch.setattr("api.routes.audit._EXPORTING", -1.0)
    with auditor.get("/admin/audit?format=jsonl") as late, pytest.raises(TimeoutError):
        late.get_data()


def test_two_exports_run_at_once_and_a_third_is_told_when(auditor: Client, services: Services) -> None:
    services.audit.append(*({"kind": "said"} for _ in range(2000)))
    first, second = (auditor.get("/admin/audit?format=jsonl") for _ in range(2))
    refused = auditor.get("/admin/audit?format=csv")
    assert_refused(refused, 503)
    assert refused.headers["Retry-After"] == "10" and auditor.get("/admin/audit").status_code == 200
    first.close()
    del first
    with auditor.get("/admin/audit?format=csv") as third:
        assert third.status_code == 200
    second.close()


def test_readers_that_stop_reading_use_up_no_threads(server: Server) -> None:
    add = [sys.executable, "-m", "flask", "--app", "app", "users", "add", "eve", "--role", "auditor", "--ask"]
    environ = {**os.environ, "DATA_DIR": str(server.log.parent / "data")}
    subprocess.run(add, input=PASSWORD, text=True, env=environ, cwd=ROOT, check=True, capture_output=True)
    eve = copy.copy(server)
    eve.token = ""
    eve.token = eve.ask("POST", "/login", {"username": "eve", "password": PASSWORD})["access_token"]
    data = server.log.parent / "data"
    log = AuditLog(Database.in_folder(data), KeyRing.load_or_create(data / "keys").mac_keys("audit"), data)
    for _ in range(4):
        log.append(*({"kind": "said", "words": "x" * 1000} for _ in range(2000)))
    stalled = [eve.connect("GET", f"/admin/audit?format={form}") for form in ("jsonl", "csv") * 8]
    try:
        answers = sorted(connection.getresponse().status for connection in stalled)
        assert answers == [200] * 2 + [503] * 14, "more would hold the threads that others need"
        assert server.ask("POST", "/generate", {"prompt": "hello"})["response"] == "hello"
    finally:
        for connection in stalled:
            connection.close()


def test_what_people_do_to_accounts_sessions_and_the_log_is_on_record(
    admin: Client, auditor: Client, nobody: Client, services: Services
) -> None:
    admin.post("/admin/users", {"username": "new", "password": "long enough"}).close()
    admin.ask("DELETE", "/admin/users/new").close()
    key = admin.post("/keys", {"name": "app", "expires_in_days": 1}).json["id"]
    admin.ask("DELETE", f"/keys/{key}").close()
    nobody.post("/login", {"username": "admin", "password": "wrong"}).close()
    nobody.post("/login", {"username": "who is that", "password": "wrong"}).close()
    auditor.get("/admin/audit?user=admin").close()
    admin.post("/logout").close()
    events = [(record["user"], record["kind"]) for record in find(services.audit) if record["kind"] != "log"]
    assert events == [
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
    assert whole(services)


def test_verifying_from_the_command_line_tells_whole_from_spoiled(
    app: Flask, admin: Client, services: Services
) -> None:
    admin.post("/generate", {"prompt": "hello"}).close()
    fine = app.test_cli_runner().invoke(args=["audit", "verify"])
    assert fine.exit_code == 0 and "whole" in fine.output
    with services.audit.database.transaction() as connection:
        connection.exec_driver_sql("UPDATE audit SET user = 'nimda' WHERE kind = 'end'")
    spoiled = app.test_cli_runner().invoke(args=["audit", "verify"])
    assert spoiled.exit_code == 1 and "columns that are not what was signed" in spoiled.output
    ahead = app.test_cli_runner().invoke(args=["audit", "verify", "--at-least", fine.output.split()[1][:-1], "999"])
    assert ahead.exit_code == 1 and "another machine remembers record 999" in ahead.output


def test_a_backup_verifies_from_the_command_line(app: Flask, admin: Client, services: Services, tmp_path: Path) -> None:
    backup, head = tmp_path / "backup.sqlite3", tmp_path / "backup-head"
    shutil.copy(services.audit.head_path, head)
    with closing(sqlite3.connect(services.settings.data_dir / "service.sqlite3")) as connection:
        connection.execute("VACUUM INTO ?", (str(backup),))
    admin.post("/generate", {"prompt": "hello"}).close()
    arguments = ["audit", "verify", "--database", str(backup), "--head", str(head)]
    done = app.test_cli_runner().invoke(args=arguments)
    assert done.exit_code == 0 and "2 records, 1 to 2" in done.output


def test_the_last_number_is_in_metrics_and_log(
    make_app: Callable[..., Flask], capsys: pytest.CaptureFixture[str]
) -> None:
    app = make_app()
    Client(app).login()
    log = app.extensions[NAME].audit
    metrics = Client(app).get("/metrics").text
    told = next(line for line in capsys.readouterr().err.splitlines() if "audit head" in line)
    (last,) = log.find(AuditFilter(), 1)
    assert 1 <= json.loads(told)["seq"] <= last.seq
    line = f'llm_audit_last_seq{{log="{json.loads(told)["log"]}"}} {float(last.seq)}'
    assert line in metrics and log.problem() is None
