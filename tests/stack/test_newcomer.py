"""The first hour with the real server: what is wrong is told in one helpful line; the rest works as it is."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from ops.stack import ROOT, Stack, free_port
from tests.conftest import lacking
from tests.stack.client import until
from tests.stack.conftest import LOADING, PASSWORD, SMALL, with_model


def start(**settings: str) -> list[str]:
    """Starts the server with settings that it cannot start with; the lines it says, without its log."""
    command = [sys.executable, "-m", "gunicorn", "app:create_app()"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    return [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith('{"')]


def test_a_busy_port_is_one_line_that_names_another(tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = str(taken.getsockname()[1])
        (line,) = start(PORT=port, DATA_DIR=str(tmp_path))
    assert line.startswith(f"PORT: 127.0.0.1:{port} is in use") and "PORT=5001" in line


def test_a_wrong_setting_is_one_line_with_an_example() -> None:
    (line,) = start(SLOTS="many")
    assert line.startswith("SLOTS: ") and "SLOTS=16" in line


def test_a_data_folder_that_cannot_be_is_one_line() -> None:
    (line,) = start(DATA_DIR="/dev/null/data", PORT=str(free_port()))
    assert line.startswith("DATA_DIR: ")


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own with a few free bytes left."""
    if os.geteuid() or not shutil.which("mount"):
        lacking("mounting a small disk needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk], capture_output=True).returncode:
        lacking("this machine may not mount a disk")
    try:
        with (disk / "filler").open("wb", buffering=0) as filler, pytest.raises(OSError, match="No space left"):
            while True:
                filler.write(bytes(4096))
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.promise("P7", injected="a full disk under DATA_DIR", counted="an exit status that is not 0")
def test_a_full_disk_is_one_line(full_disk: Path, counted: Callable[..., None]) -> None:
    lines = start(DATA_DIR=str(full_disk), PORT=str(free_port()))
    counted(lines=len(lines))
    (line,) = lines
    assert str(full_disk) in line and "No space left on device" in line


@pytest.mark.promise("P7", injected="a bad model under PRELOAD", counted="an exit status that is not 0")
def test_a_model_that_cannot_be_loaded_at_the_start_ends_the_service_in_one_line(
    tmp_path: Path, counted: Callable[..., None]
) -> None:
    bad = tmp_path / "bad-model"
    bad.mkdir()
    (bad / "config.json").write_text("{")
    place = {"DATA_DIR": str(tmp_path / "data"), "PORT": str(free_port()), "ADMIN_PASSWORD": PASSWORD}
    welcome, *lines = start(MODEL=str(bad), PRELOAD="true", **place)
    counted(lines=len(lines))
    (line,) = lines
    assert welcome.startswith("Open http") and line.startswith(f"MODEL={bad} ") and "config.json" in line


def test_without_a_compiler_and_from_the_lan_it_just_works(models: Path, tmp_path: Path) -> None:
    data_dir = with_model(models, tmp_path / "data")
    (tmp_path / "empty").mkdir()
    bare = {"PATH": str(tmp_path / "empty"), "CXX": "", "CC": "", "COMPILE": "on"}
    lan = {"HOST": "0.0.0.0", "REDIS_URL": "", "TRUSTED_PROXIES": ""}
    settings = SMALL | bare | lan | {"DATA_DIR": str(data_dir), "PRELOAD": "true"}
    with (
        (tmp_path / "log").open("wb") as log,
        Stack(tmp_path / "stack", settings, free_port(), log, parts=["gunicorn"]) as stack,
    ):
        until(lambda: ask(stack, "GET", "/readyz")[0] == 200, seconds=LOADING)
        token = ask(stack, "POST", "/login", {"username": "admin", "password": PASSWORD})[1]["access_token"]
        question = {"prompt": "Why is the sky blue?", "max_new_tokens": 4}
        status, answer = ask(stack, "POST", "/generate", question, token)
    assert (status, answer["usage"]["completion_tokens"]) == (200, 4)
    said = (tmp_path / "log").read_text()
    assert f"Open http://127.0.0.1:{stack.app}, sign in as admin; the model is loading.\n" in said


def ask(stack: Stack, method: str, path: str, body: object = None, token: str = "") -> tuple[int, dict]:
    """As another machine of the network would: by another address than 127.0.0.1, and by a name."""
    headers = {"Host": "my-box.lan:5000", "Content-Type": "application/json", "Authorization": f"Bearer {token}"}
    with closing(http.client.HTTPConnection("127.0.0.2", stack.app, timeout=LOADING)) as connection:
        connection.request(method, path, json.dumps(body) if body else None, headers)
        with connection.getresponse() as response:
            return response.status, json.loads(response.read())
