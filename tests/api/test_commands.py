"""`flask --app app users ...` and `keys ...`: over the app in process, and as real commands."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from flask import Flask

from accounts.users import UserLimits
from api.context import Services
from crypto import KeyRing
from tests.api.conftest import PASSWORD, Client
from tests.api.server import ROOT

Run = Callable[..., Result]


@pytest.fixture
def run(app: Flask) -> Run:
    return lambda line, **more: app.test_cli_runner().invoke(args=["users", *line.split()], **more)


def test_an_account_is_added_with_a_password_that_works(run: Run, nobody: Client) -> None:
    done = run("add ann --role auditor")
    assert done.exit_code == 0 and "Added ann (auditor)." in done.output
    password = done.output.split("The password is ")[1].split()[0]
    assert nobody.login("ann", password).get("/v1/models").status_code == 200


def test_a_password_is_read_from_standard_input_and_not_repeated(run: Run, nobody: Client) -> None:
    done = run("add ann --ask", input=f"{PASSWORD}\n")
    assert done.exit_code == 0 and PASSWORD not in done.output
    nobody.login("ann", PASSWORD)
    done = run("password ann --ask", input="another long password\n")
    assert done.exit_code == 0
    nobody.login("ann", "another long password")
    done = run("password ann --ask", input="short\n")
    assert done.exit_code == 1 and "8 to 1024 characters" in done.output
    nobody.login("ann", "another long password")


def test_role_state_and_limits_change_and_the_list_tells(run: Run, services: Services) -> None:
    for line in (
        "add ann",
        "role ann auditor",
        "add second --role auditor",
        "disable ann",
        "limits ann --rpm 5 --tokens-per-day 1000",
        "limits ann --rpm role",
    ):
        assert run(line).exit_code == 0, line
    listed = [json.loads(line) for line in run("list").stdout.splitlines()]
    assert listed == [
        {"username": "admin", "role": "admin", "disabled": False},
        {"username": "ann", "role": "auditor", "disabled": True, "tokens_per_day": 1000},
        {"username": "second", "role": "auditor", "disabled": False},
    ]
    assert services.users.get("ann").limits == UserLimits(tokens_per_day=1000)
    assert run("enable ann").exit_code == 0 and not services.users.get("ann").disabled
    assert run("delete ann").exit_code == 0 and services.users.get("ann") is None


def test_a_command_that_ends_rights_ends_sessions_and_keys(run: Run, add_user: Callable[..., Client]) -> None:
    bob = add_user("bob")
    key = Client(bob.app, bob.post("/keys", {"name": "ci"}).json["key"])
    for line in ("disable bob", "enable bob"):
        assert run(line).exit_code == 0
    assert [caller.get("/v1/models").status_code for caller in (bob, key)] == [401, 401]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("add admin", "The user name is taken"),
        ("add a/b", "A user name is"),
        ("add ann --role root", "'root' is not one of"),
        ("role nobody user", "No such user"),
        ("password nobody", "No such user"),
        ("delete admin", "This is the last admin"),
        ("disable admin", "This is the last admin"),
        ("role admin user", "This is the last admin"),
        ("limits admin --rpm 0", "0 is not in the range"),
        ("limits admin --rpm many", "'many' is not a valid integer"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(run: Run, services: Services, line: str, words: str) -> None:
    before = services.users.page()
    done = run(line)
    assert done.exit_code != 0 and words in done.output and "Traceback" not in done.output
    assert services.users.page() == before


def test_the_last_auditor_is_kept_like_the_last_admin(run: Run, services: Services) -> None:
    run("add ann --role auditor")
    for line in ("disable ann", "role ann user", "delete ann"):
        done = run(line)
        assert done.exit_code == 1 and "This is the last auditor" in done.output
    run("add second --role auditor")
    assert run("delete ann").exit_code == 0


def test_limits_without_options_are_shown_and_not_changed(run: Run, services: Services) -> None:
    run("limits admin --rpm 7")
    before = services.users.get("admin")
    done = run("limits admin")
    assert json.loads(done.stdout) == {"streams": 10, "rpm": 7, "tokens_per_day": 0}
    assert "Changed" not in done.output and services.users.get("admin") == before


def test_a_key_made_by_command_works_and_is_its_owners(app: Flask, run: Run, nobody: Client) -> None:
    run("add ann --ask", input=f"{PASSWORD}\n")
    done = app.test_cli_runner().invoke(args=["keys", "add", "--user", "ann", "--name", "ci", "--days", "3"])
    assert done.exit_code == 0
    assert Client(app, done.stdout.strip()).post("/generate", {"prompt": "hi"}).status_code == 200
    assert [key["name"] for key in nobody.login("ann").get("/keys").json["keys"]] == ["ci"]
    missing = app.test_cli_runner().invoke(args=["keys", "add", "--user", "bob", "--name", "ci"])
    assert missing.exit_code == 1 and "No such user" in missing.output


@pytest.fixture
def flask(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A real command, with `tmp_path` as DATA_DIR unless said otherwise."""

    def command(*words: str, module: str = "flask", **settings: str) -> subprocess.CompletedProcess[str]:
        environ = {**os.environ, "DATA_DIR": str(tmp_path), **settings}
        line = [sys.executable, "-m", module, *words]
        return subprocess.run(line, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60)

    return command


def test_a_lost_password_is_replaced_without_a_running_service(
    make_app: Callable[..., Flask], flask: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    nobody = Client(make_app())
    done = flask("--app", "app", "users", "password", "admin")
    assert done.returncode == 0, done.stderr
    nobody.login("admin", done.stdout.split("The password is ")[1].split()[0])
    done = flask("--app", "app", "users", "delete", "admin")
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("Error: This is the last admin")


def test_a_command_with_a_wrong_data_dir_says_so_and_makes_nothing(
    tmp_path: Path, flask: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    secret = tmp_path / "handed over"
    secret.write_text("ab" * 32)
    handed_over = {"JWT_SECRET_FILE": str(secret), "KEY_FILE": str(secret)}
    disable, add = ("users", "disable", "ann"), ("keys", "add", "--user", "a", "--name", "b")
    for words, folder, more in (
        (disable, tmp_path / "missing", {}),
        (add, tmp_path, {}),
        (add, tmp_path / "missing", handed_over),
    ):
        done = flask("--app", "app", *words, DATA_DIR=str(folder), **more)
        assert done.returncode == 1 and done.stdout == ""
        assert re.fullmatch(rf"DATA_DIR: no service has run with {folder} [^\n]+\n", done.stderr)
    assert list(tmp_path.iterdir()) == [secret]


@pytest.mark.parametrize(("module", "words"), [("flask", ("--app", "app", "users", "list")), ("crypto", ())])
def test_a_wrong_setting_is_one_line_for_a_command_too(
    flask: Callable[..., subprocess.CompletedProcess[str]], module: str, words: tuple[str, ...]
) -> None:
    done = flask(*words, module=module, SLOTS="many")
    assert done.returncode == 1 and re.fullmatch(r"SLOTS: [^\n]+\n", done.stderr)


def test_rotating_makes_no_key_file_where_there_is_none(
    tmp_path: Path, flask: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    missing = tmp_path / "nope" / "keys"
    done = flask(module="crypto", KEY_FILE=str(missing))
    assert done.returncode == 1 and done.stderr == f"{missing}: No such file or directory; the keys stay as they are\n"
    assert list(tmp_path.iterdir()) == []
    KeyRing.load_or_create(tmp_path / "keys")
    assert flask(module="crypto").returncode == 0
    assert len((tmp_path / "keys").read_text().splitlines()) == 2
