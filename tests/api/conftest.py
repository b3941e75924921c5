"""The app over a scripted Backend: in process, and behind a real gunicorn on loopback."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from argon2 import PasswordHasher
from flask import Flask
from werkzeug.test import TestResponse

from accounts.passwords import Passwords
from api.context import NAME, Services
from app import create_app
from settings import Settings
from tests.api.scripted import ScriptedBackend
from tests.api.server import Server

PASSWORD = "correct horse battery"


@dataclass(frozen=True, slots=True)
class Client:
    """One caller of an app in process."""

    app: Flask
    token: str | None = None

    def ask(self, method: str, path: str, json: object = None, **more: Any) -> TestResponse:
        headers = dict(more.pop("headers", {}))
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        if json is not None:
            more["json"] = json
        return self.app.test_client(use_cookies=False).open(path, method=method, headers=headers, **more)

    def post(self, path: str, json: object = None, **more: Any) -> TestResponse:
        return self.ask("POST", path, json, **more)

    def get(self, path: str, **more: Any) -> TestResponse:
        return self.ask("GET", path, **more)

    def login(self, name: str = "admin", password: str = PASSWORD) -> Client:
        answer = self.post("/login", {"username": name, "password": password})
        assert answer.status_code == 200, answer.text
        answer.close()
        return Client(self.app, answer.json["access_token"])


def assert_refused(answer: TestResponse, status: int) -> None:
    """The answer is this error, in the contract's shape, and says nothing about the inside."""
    assert answer.status_code == status, answer.text
    error = answer.json["error"]
    assert {"message", "type", "code", "param"} <= set(error)
    assert "Traceback" not in answer.text and ".py" not in answer.text


@pytest.fixture
def backend() -> ScriptedBackend:
    return ScriptedBackend()


@pytest.fixture
def make_app(tmp_path: Path, backend: ScriptedBackend, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Flask]:
    """An app with other settings than usual."""

    cheap = PasswordHasher(time_cost=1, memory_cost=64, parallelism=1)
    monkeypatch.setattr("api.context.Passwords", lambda: Passwords(cheap))

    def make(**settings: Any) -> Flask:
        return create_app(Settings(**{"data_dir": tmp_path, "admin_password": PASSWORD, **settings}), backend)

    return make


@pytest.fixture
def app(make_app: Callable[..., Flask]) -> Flask:
    return make_app()


@pytest.fixture
def services(app: Flask) -> Services:
    return app.extensions[NAME]


@pytest.fixture
def nobody(app: Flask) -> Client:
    return Client(app)


@pytest.fixture
def admin(nobody: Client) -> Client:
    return nobody.login()


@pytest.fixture
def add_user(services: Services, nobody: Client) -> Callable[..., Client]:
    """Makes a user and logs in."""

    def add(name: str, role: str = "user") -> Client:
        services.users.add(name, role, services.passwords.hash(PASSWORD))
        return nobody.login(name)

    return add


@pytest.fixture(autouse=True)
def log_ends_with_the_test() -> Iterator[None]:
    """The log's file or captured stderr belongs to one test."""
    yield
    for handler in [each for each in logging.getLogger().handlers if each.get_name() == "flask-llm"]:
        logging.getLogger().removeHandler(handler)
        handler.close()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A gunicorn that lives through all tests."""
    with Server(tmp_path_factory.mktemp("served"), PASSWORD) as running:
        yield running
