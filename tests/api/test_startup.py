"""What create_app makes on its first start, and what it refuses to start with."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from api.context import NAME
from app import create_app
from settings import Settings
from tests.api.conftest import PASSWORD, Client
from tests.api.scripted import ScriptedBackend

MakeApp = Callable[..., Flask]


def test_without_a_password_one_is_made_shown_once_and_stored_hashed(
    make_app: MakeApp, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    app = make_app(admin_password=None)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "password" in line]
    password = line.split("password ")[1].split(" ")[0]
    Client(app).login("admin", password)
    assert password.encode() not in b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    make_app(admin_password=None)
    assert "password" not in capfd.readouterr().err
    Client(make_app(admin_password=None)).login("admin", password)


def test_a_given_password_is_not_shown_and_does_not_replace_an_older_one(
    make_app: MakeApp, capfd: pytest.CaptureFixture[str]
) -> None:
    Client(make_app()).login()
    later = Client(make_app(admin_password="another passphrase"))
    later.login("admin", PASSWORD)
    assert later.post("/login", {"username": "admin", "password": "another passphrase"}).status_code == 401
    assert PASSWORD not in "".join(capfd.readouterr())


def test_password_and_key_may_come_from_files(make_app: MakeApp, tmp_path: Path) -> None:
    (tmp_path / "password").write_text("from a file, with a line end\n")
    (tmp_path / "key").write_text("0123456789abcdef" * 4 + "\n")
    files = {"admin_password_file": tmp_path / "password", "jwt_secret_file": tmp_path / "key"}
    app = make_app(admin_password=None, **files)
    token = Client(app).login("admin", "from a file, with a line end").token
    assert Client(make_app(**files), token).get("/keys").status_code == 200
    assert Client(make_app(), token).get("/keys").status_code == 401


def test_what_is_kept_is_for_this_user_only_and_tokens_outlive_a_restart(make_app: MakeApp, tmp_path: Path) -> None:
    folder = tmp_path / "deeper" / "data"
    token = Client(make_app(data_dir=folder)).login().token
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.rglob("*") if file.is_file()} == {0o600}
    assert Client(make_app(data_dir=folder), token).get("/keys").status_code == 200


def test_a_revoked_token_stays_revoked_after_a_restart(make_app: MakeApp) -> None:
    admin = Client(make_app()).login()
    admin.post("/logout")
    assert Client(make_app(), admin.token).get("/keys").status_code == 401


@pytest.mark.parametrize(
    ("settings", "begins"),
    [
        ({"model": "no-such-model"}, "MODEL=no-such-model"),
        ({"redis_url": "http://:hunter2@localhost"}, "REDIS_URL: "),
        ({"jwt_secret_file": Path("/nowhere/key")}, "JWT_SECRET_FILE: "),
        ({"admin_password_file": Path("/nowhere/password"), "admin_password": None}, "ADMIN_PASSWORD_FILE: "),
        ({"data_dir": Path("/proc/nowhere")}, "DATA_DIR: "),
        ({"log_file": Path("/nowhere/log")}, "LOG_FILE: "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_work_ends_the_start_in_one_line(
    make_app: MakeApp, capfd: pytest.CaptureFixture[str], settings: dict[str, Any], begins: str
) -> None:
    with pytest.raises(SystemExit) as end:
        make_app(**settings)
    assert end.value.code not in {0, None}
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(begins) and "hunter2" not in line


def test_a_short_secret_is_refused(make_app: MakeApp, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "key").write_text("secure")
    with pytest.raises(SystemExit):
        make_app(jwt_secret_file=tmp_path / "key")
    assert capfd.readouterr().err.startswith("JWT_SECRET_FILE: ")


@pytest.mark.parametrize(
    ("setting", "content"),
    [
        ("admin_password_file", b"hunter2\n"),
        ("admin_password_file", b""),
        ("admin_password_file", b"hunter2" * 1000),
        ("admin_password_file", b"hunter2 hunter2 \xff"),
        ("redis_url_file", b"redis://:hunter2\xff@127.0.0.1"),
        ("redis_url_file", b"hunter2"),
    ],
    ids=repr,
)
def test_a_file_that_holds_no_such_thing_is_one_line_that_does_not_tell_it(
    make_app: MakeApp, tmp_path: Path, capfd: pytest.CaptureFixture[str], setting: str, content: bytes
) -> None:
    (tmp_path / "given").write_bytes(content)
    with pytest.raises(SystemExit):
        make_app(admin_password=None, **{setting: tmp_path / "given"})
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"{setting.upper()}: ") and "hunter2" not in line


def test_two_apps_in_one_process_do_not_share_anything(tmp_path: Path) -> None:
    one, two = (
        create_app(Settings(data_dir=tmp_path / name, admin_password=PASSWORD), ScriptedBackend()) for name in "ab"
    )
    assert one.extensions[NAME] is not two.extensions[NAME]
    assert Client(two, Client(one).login().token).get("/keys").status_code == 401
