"""The distribution's chromium, and the service it visits: with the demo model, and with a scripted backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, expect, sync_playwright

from api.routes.page import WEB
from ops.stack import Stack
from tests.api.server import Server
from tests.conftest import program
from tests.stack.client import Door, until
from tests.stack.conftest import LOADING, SMALL, models, need, with_model
from tests.web.visitor import PASSWORD, PATIENCE, Visitor, visiting

if not WEB.is_dir():  # the page was deleted, and its tests with it
    collect_ignore_glob = ["test_*.py"]
__all__ = ["models"]  # a fixture of the stack's tests, used here too
Visit = Callable[..., Visitor]


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """chromium without a window. As root it has no sandbox to go into; it sees only our own page."""
    chromium = program("chromium")
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-dev-shm-usage"]
        running = playwright.chromium.launch(executable_path=chromium, args=options)
        yield running
        running.close()


@pytest.fixture(scope="session")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The service with a backend that repeats the question, so that a test writes the answer. HTML is let through."""
    own = {"application": "tests.web.served:create()", "SANITISE": "off", "USER_STREAMS": "100"}
    with Server(tmp_path_factory.mktemp("echo"), PASSWORD, **own) as running:
        yield running


@pytest.fixture(scope="session")
def service(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the service with the demo model, which loads with the first question."""
    need("openssl")
    folder = tmp_path_factory.mktemp("page")
    own = {"DATA_DIR": str(with_model(models, folder / "data", "compiled")), "REDIS_URL": "", "TRUSTED_PROXIES": "0"}
    settings = SMALL | own | {"ADMIN_PASSWORD": PASSWORD, "USER_RPM": "10000"}
    with (folder / "log").open("wb") as log, Stack(folder / "stack", settings, 0, log, parts=["gunicorn"]) as stack:
        until(lambda: Door(stack).direct("/healthz").status == 200, seconds=LOADING)
        yield f"http://127.0.0.1:{stack.app}"


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visit]:
    """Makes visitors, each with a browser profile of its own."""
    with ExitStack() as visits:

        def enter(url: str, **options: Any) -> Visitor:
            return visits.enter_context(visiting(browser, url, **options))

        yield enter


@pytest.fixture
def reader(visit: Visit, echo: Server) -> Visitor:
    """Logged in where answers repeat the question."""
    return visit(f"http://127.0.0.1:{echo.port}").open().login().inside()
