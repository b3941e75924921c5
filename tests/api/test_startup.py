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


def test_the_signing_key_may_come_from_a_file(make_app: MakeApp, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("0123456789abcdef" * 4 + "\n")
    token = Client(make_app(jwt_secret_file=tmp_path / "key")).login().token
    assert Client(make_app(jwt_secret_file=tmp_path / "key"), token).get("/keys").status_code == 200
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
        ({"jwt_secret_file": Path("/nowhere/key")}, "JWT_SECRET_FILE: "),
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
    assert line.startswith(begins)


def test_a_short_secret_is_refused(make_app: MakeApp, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "key").write_text("secure")
    with pytest.raises(SystemExit):
        make_app(jwt_secret_file=tmp_path / "key")
    assert capfd.readouterr().err.startswith("JWT_SECRET_FILE: ")


def test_two_apps_in_one_process_do_not_share_anything(tmp_path: Path) -> None:
    one, two = (
        create_app(Settings(data_dir=tmp_path / name, admin_password=PASSWORD), ScriptedBackend()) for name in "ab"
    )
    assert one.extensions[NAME] is not two.extensions[NAME]
    assert Client(two, Client(one).login().token).get("/keys").status_code == 401


def test_under_a_path_every_address_is_served_with_and_without_it(make_app: MakeApp) -> None:
    nobody = Client(make_app(url_prefix="/llm"))
    for prefix in ("/llm", ""):
        assert nobody.get(f"{prefix}/healthz").status_code == 200
        answer = nobody.post(f"{prefix}/login", {"username": "admin", "password": PASSWORD})
        admin = Client(nobody.app, answer.json["access_token"])
        assert admin.post(f"{prefix}/v1/chat/completions", {}).json["error"].keys() == {
            *("message", "type", "param", "code")
        }
        assert admin.post(f"{prefix}/generate", {"prompt": "hi"}).json["response"] == "hi"
    assert nobody.get("/llmx/healthz").status_code == 404
