"""`flask --app app users ...`: over the app in process, and once as a real command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from flask import Flask

from accounts.users import UserLimits
from api.context import Services
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


def test_role_state_and_limits_change_and_the_list_tells(run: Run, rooms: Services) -> None:
    for line in (
        "add ann",
        "role ann auditor",
        "disable ann",
        "limits ann --rpm 5 --tokens-per-day 1000",
        "limits ann --rpm role",
    ):
        assert run(line).exit_code == 0, line
    listed = [json.loads(line) for line in run("list").stdout.splitlines()]
    assert listed == [
        {"username": "admin", "role": "admin", "disabled": False},
        {"username": "ann", "role": "auditor", "disabled": True, "tokens_per_day": 1000},
    ]
    assert rooms.users.get("ann").limits == UserLimits(tokens_per_day=1000)
    assert run("enable ann").exit_code == 0 and not rooms.users.get("ann").disabled
    assert run("delete ann").exit_code == 0 and rooms.users.get("ann") is None


def test_a_command_that_ends_rights_ends_sessions_and_keys(run: Run, add_user: Callable[..., Client]) -> None:
    bob = add_user("bob")
    key = Client(bob.app, bob.post("/keys", {"name": "ci"}).json["key"])
    for line in ("disable bob", "enable bob"):
        assert run(line).exit_code == 0
    assert [caller.get("/v1/models").status_code for caller in (bob, key)] == [401, 401]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("add admin", "the user name is taken"),
        ("add a/b", "a user name is"),
        ("add ann --role root", "'root' is not one of"),
        ("role nobody user", "no such user"),
        ("password nobody", "no such user"),
        ("delete admin", "this is the last admin"),
        ("disable admin", "this is the last admin"),
        ("role admin user", "this is the last admin"),
        ("limits admin --rpm 0", "0 is not in the range"),
        ("limits admin --rpm many", "'many' is not a valid integer"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(run: Run, rooms: Services, line: str, words: str) -> None:
    before = rooms.users.page()
    done = run(line)
    assert done.exit_code != 0 and words in done.output and "Traceback" not in done.output
    assert rooms.users.page() == before


def test_the_command_needs_no_server_and_says_what_is_wrong(tmp_path: Path) -> None:
    environ = {**os.environ, "DATA_DIR": str(tmp_path), "ADMIN_PASSWORD": PASSWORD}
    command = [sys.executable, "-m", "flask", "--app", "app", "users"]

    def flask(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *words], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60)

    assert json.loads(flask("list").stdout) == {"username": "admin", "role": "admin", "disabled": False}
    done = flask("delete", "admin")
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == "Error: this is the last admin"
    assert PASSWORD not in done.stdout + done.stderr
