"""nginx alone, or the whole stack with the demo model, each started once for all tests here."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from ops.stack import Stack, StackError, free_port, program
from tests.stack.client import Door


def need(*programs: str) -> None:
    """Skips the test when one of the programs is missing; in CI that is a failure."""
    for name in programs:
        try:
            program(name)
        except StackError as missing:
            (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(str(missing))


@pytest.fixture(scope="session")
def closed_door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    """nginx with nobody behind it."""
    need("nginx", "openssl")
    folder = tmp_path_factory.mktemp("nginx")
    with (
        (folder / "log").open("wb") as log,
        Stack(folder / "stack", {}, free_port(), log, parts=["nginx"]) as stack,
    ):
        yield Door(stack)
