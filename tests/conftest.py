"""What several folders' tests need: a real Redis, both databases, and one way to miss what a machine lacks."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from sqlalchemy import text

from db import Database
from tests.leaks import leaks
from tests.promises import counted

__all__ = ["counted"]  # a fixture, for every test
pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[1]
# Of the users that tests log in with.
PASSWORDS = ("correct horse battery", "hunter2")


def lacking(reason: str) -> NoReturn:
    """Skips the test for what this machine does not have or allow; with CI=true it fails."""
    (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)


def program(name: str) -> str:
    """Where `name` is installed; without it the test is `lacking`."""
    return shutil.which(name) or lacking(f"{name} is not installed")


@pytest.fixture(scope="session", autouse=True)
def no_secret_was_written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """After the whole run: nothing that any service wrote in it holds a password or a token."""
    yield
    assert leaks(tmp_path_factory.getbasetemp(), PASSWORDS) == []


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A redis-server of its own on loopback, empty at first, that keeps nothing on disk."""
    command, folder = program("redis-server"), tmp_path_factory.mktemp("redis")
    for _ in range(5):  # a port found free may be taken a moment later
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        with _redis(command, port, folder) as server:
            if _ready(server):
                yield f"redis://127.0.0.1:{port}/0"
                server.terminate()
                return
    pytest.fail("redis-server does not start")


def _redis(command: str, port: int, folder: Path) -> subprocess.Popen[str]:
    options = f"--bind 127.0.0.1 --port {port} --dir {folder} --appendonly no --save".split()
    return subprocess.Popen([command, *options, ""], stdout=subprocess.PIPE, text=True)


def _ready(server: subprocess.Popen[str]) -> bool:
    assert server.stdout is not None
    return any("Ready to accept connections" in line for line in server.stdout)


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A PostgreSQL of its own on loopback, from the distribution's binaries; it refuses to run as root."""
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    if not binaries:
        lacking("postgresql is not installed")
    as_postgres = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.getuid() == 0 else {}
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))  # pytest's own folders are closed to other users
    if as_postgres:
        shutil.chown(folder, "postgres", "postgres")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    made = [str(binaries[-1] / "initdb"), "-D", "data", "-U", "llm", "-A", "trust", "-E", "UTF8", "--no-sync"]
    subprocess.run(made, cwd=folder, check=True, capture_output=True, timeout=60, **as_postgres)
    options = f"-D data -h 127.0.0.1 -p {port} -k {folder} -c fsync=off -c max_connections=200".split()
    command = [str(binaries[-1] / "postgres"), *options]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, **as_postgres)
    try:
        _wait_for_port(port)
        yield f"postgresql+psycopg://llm@127.0.0.1:{port}/postgres"
    finally:
        server.send_signal(signal.SIGQUIT)  # at once: what a checkpoint would write is deleted anyway
        server.wait(30)
        shutil.rmtree(folder)


def _wait_for_port(port: int) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            assert time.monotonic() < deadline, "PostgreSQL does not start"
            time.sleep(0.05)


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """An empty database with the service's tables, once of each kind."""
    if request.param == "sqlite":
        db = Database.in_folder(tmp_path)
    else:
        db = Database(request.getfixturevalue("postgres_url"))
        with db.transaction() as connection:
            connection.execute(text("DROP SCHEMA public CASCADE"))
            connection.execute(text("CREATE SCHEMA public"))
    db.upgrade()
    yield db
    db.close()
