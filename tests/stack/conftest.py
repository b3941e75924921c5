"""nginx alone, or the whole stack with the demo model, each started once for all tests here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from model.weights.catalogue import ModelError
from model.weights.loader import fetch
from ops.stack import ROOT, Stack, StackError, free_port, program
from settings import Settings
from tests.conftest import lacking
from tests.stack.client import Door, until

PASSWORD = "correct horse battery staple"
# The demo model, quickly there and steady on a busy machine: little KV memory, one thread, no compiler beside it.
SMALL = {"ADMIN_PASSWORD": PASSWORD, "SLOTS": "4", "MAX_CONTEXT": "1024", "THREADS": "1", "COMPILE": "off"}
LOADING = 100.0  # seconds, on a machine that is busy with other things


def need(*programs: str) -> None:
    """Skips the test when one of the programs is missing; in CI that is a failure."""
    for name in programs:
        try:
            program(name)
        except StackError as missing:
            lacking(str(missing))


@pytest.fixture(scope="session")
def closed_door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    """nginx without an app behind it."""
    need("nginx", "openssl")
    folder = tmp_path_factory.mktemp("nginx")
    with (
        (folder / "log").open("wb") as log,
        Stack(folder / "stack", {}, free_port(), log, parts=["nginx"]) as stack,
    ):
        yield Door(stack)


@pytest.fixture(scope="session")
def models() -> Path:
    """The repository's own data folder with the demo model, made on the first run of all (a minute) and kept."""
    settings = Settings(data_dir=ROOT / "data")
    try:
        fetch(settings)
    except ModelError as missing:
        lacking(str(missing))
    return settings.data_dir


@pytest.fixture
def data_dir(models: Path, tmp_path: Path) -> Path:
    """An empty data folder, but for the demo model and built kernels."""
    return with_model(models, tmp_path / "data", "compiled")


def with_model(models: Path, folder: Path, *shared: str) -> Path:
    """Makes a data folder that shares the prepared models (and what else is named) and nothing more."""
    folder.mkdir()
    for name in ("models", *shared):
        (models / name).mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(models / name)
    return folder


@pytest.fixture(scope="session")
def door(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    """nginx, the app with the demo model, and Redis; signed in as admin."""
    need("redis-server", "nginx", "openssl")
    folder = tmp_path_factory.mktemp("stack")
    settings = SMALL | {"DATA_DIR": str(with_model(models, folder / "data", "compiled")), "PRELOAD": "true"}
    with (folder / "log").open("wb") as log, Stack(folder / "stack", settings, free_port(), log) as stack:
        started = Door(stack)
        until(lambda: started.direct("/readyz").status == 200, seconds=LOADING)
        yield started.login(PASSWORD)
