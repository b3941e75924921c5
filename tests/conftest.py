"""What several rooms' tests need: a real Redis, and one way to miss what a machine lacks.

Holds no fixture that only one room uses; those live in the room's own conftest.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from tests.leaks import leaks
from tests.promises import counted

__all__ = ["counted"]  # a fixture, for every test
pytest_plugins = ["pytester"]

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
