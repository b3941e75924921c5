"""Builds each service once and hands it to the routes: the only file that knows everybody.

Answers no request itself.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from flask import Flask
from flask_openapi3.models.info import Info
from flask_openapi3.openapi import OpenAPI
from prometheus_flask_exporter import PrometheusMetrics
from werkzeug.middleware.proxy_fix import ProxyFix

from api import auth, bearer, errors, generate, guards, health, openai, page, trace
from api.answers import Answers
from api.places import LOGINS, Places, generations
from api.running import Running
from api.services import NAME, Services
from model.flight import Flights
from model.registry import ModelError, find
from model.types import Backend, ServiceError
from security.crypto import Box, KeyFileError, derive, load_or_create_key
from security.limits import LoginGuard, RequestRate, StreamLimit
from security.passwords import Passwords
from security.passwords import generate as random_password
from security.roles import Role
from security.sanitise import sanitise
from security.tokens import TokenPolicy
from settings import PASSWORD_LONGEST, PASSWORD_SHORTEST, Settings, SettingsError
from store.breaker import Breaker
from store.cache import Cache, RedisCache, SqliteCache
from store.database import Database, StoreUnavailable
from store.responses import ResponseCache
from store.state import State
from store.users import UserExists, Users
from telemetry import Metrics, configure_logging

_YEAR = 366 * 86_400
_APP_LOAD_ERROR = 4  # gunicorn's word for "do not try again"


def create_app(settings: Settings | None = None, backend: Backend | None = None) -> Flask:
    """The app, ready to serve. Exits with one line on stderr when a setting or the data folder is no good.

    Loads no model: the first request does, or PRELOAD, which gunicorn.conf.py sees to.
    """
    with _refusals():
        settings = settings or Settings.from_environment()
        _log_to(settings)
        metrics = Metrics()
        rooms = _services(settings, metrics, backend or _local(settings, metrics))
        _first_user(settings, rooms)
    return _flask(settings, rooms, metrics)


def _flask(settings: Settings, rooms: Services, metrics: Metrics) -> Flask:
    bearer_scheme = {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}
    app = OpenAPI(
        __name__,
        info=Info(title="Flask LLM", version="1"),
        security_schemes={"bearer": bearer_scheme},
        validation_error_callback=errors.invalid,
        validation_error_model=errors.ErrorBody,
        validation_error_status=400,  # every route documents its own; 422 would be added where there is none
        doc_ui=False,
        static_folder=None,
    )
    app.extensions[NAME] = rooms
    trace.register(app)
    PrometheusMetrics(app, registry=metrics.registry, group_by="url_rule", metrics_decorator=health.scrapers)
    guards.register(app)
    errors.register(app)
    bearer.register(app, rooms)
    for room in (health, auth, generate, openai, page):
        app.register_api(room.blueprint)
    if hops := settings.trusted_proxies:
        app.wsgi_app = ProxyFix(app.wsgi_app, x_for=hops, x_proto=hops)  # type: ignore[method-assign]
    return app


def _services(settings: Settings, metrics: Metrics, backend: Backend) -> Services:
    settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    secret = _secret(settings)
    db = Database(settings.data_dir / "state.sqlite3")
    cache = ResponseCache(
        _cache(settings, metrics),
        Box(derive(secret, "cache")),
        derive(secret, "cache key"),
        settings.cache_ttl,
        lambda result: metrics.cache_lookups.labels(result).inc(),
    )
    return Services(
        settings=settings,
        model=find(settings).name,
        backend=backend,
        answers=Answers(backend, Flights(), cache, settings.cache_shared),
        running=Running(),
        users=Users(db),
        state=State(db),
        passwords=Passwords(),
        policy=TokenPolicy(NAME, NAME, settings.access_ttl, settings.refresh_ttl, _YEAR),
        jwt_key=derive(secret, "jwt"),
        box=Box(derive(secret, "tickets")),
        rate=RequestRate(settings.user_rpm),
        streams=StreamLimit(settings.user_streams),
        logins=LoginGuard(),
        calls=Places(generations(settings.slots, settings.max_queue), retry_after=5),
        guesses=Places(LOGINS, retry_after=1),
        sanitise=sanitise if settings.sanitise == "strip" else str,
    )


def _log_to(settings: Settings) -> None:
    try:
        configure_logging(settings.log_level, settings.log_file)
    except OSError as error:
        raise SettingsError(f"LOG_FILE: cannot write {settings.log_file}: {error.strerror}") from None


def _local(settings: Settings, metrics: Metrics) -> Backend:
    from model.local import LocalBackend  # only here, so that nothing else that imports app pays for a model

    return LocalBackend(settings, metrics)


def _cache(settings: Settings, metrics: Metrics) -> Cache:
    url = settings.redis_url
    if settings.redis_url_file is not None:
        url = _read_text("REDIS_URL_FILE", settings.redis_url_file)
    if not url:
        return SqliteCache(settings.data_dir / "cache.sqlite3")
    try:
        return RedisCache(url, Breaker(on_change=metrics.breaker_open.set))
    except ValueError:  # its words may hold the password
        raise SettingsError("REDIS_URL: is not an address (for example REDIS_URL=redis://127.0.0.1:6379/0)") from None


def _secret(settings: Settings) -> bytes:
    """What every key is derived from: the operator's file, or one that is made once in the data folder."""
    if settings.jwt_secret_file is None:
        return load_or_create_key(settings.data_dir / "secret")
    secret = _read("JWT_SECRET_FILE", settings.jwt_secret_file)
    if len(secret) < 32:
        raise SettingsError("JWT_SECRET_FILE: needs 32 characters or more (for example from: openssl rand -hex 32)")
    return secret


def _first_user(settings: Settings, rooms: Services) -> None:
    if rooms.users.count():
        return
    password = _admin_password(settings)
    made = password or random_password()
    try:
        rooms.users.add("admin", Role.ADMIN, rooms.passwords.hash(made))
    except UserExists:
        return  # another process was first
    if not password:
        print(f"First start: sign in as admin with the password {made} (it is not shown again)", file=sys.stderr)


def _admin_password(settings: Settings) -> str | None:
    if settings.admin_password_file is None:
        return settings.admin_password
    password = _read_text("ADMIN_PASSWORD_FILE", settings.admin_password_file)
    if not PASSWORD_SHORTEST <= len(password) <= PASSWORD_LONGEST:
        bounds = f"{PASSWORD_SHORTEST} to {PASSWORD_LONGEST}"
        raise SettingsError(f"ADMIN_PASSWORD_FILE: needs {bounds} characters (for example from: openssl rand -hex 12)")
    return password


def _read_text(setting: str, file: Path) -> str:
    try:
        return _read(setting, file).decode()
    except UnicodeDecodeError:
        raise SettingsError(f"{setting}: {file} is not text in UTF-8") from None


def _read(setting: str, file: Path) -> bytes:
    try:
        return file.read_bytes().strip()
    except OSError as error:
        raise SettingsError(f"{setting}: cannot read {file}: {error.strerror}") from None


@contextmanager
def _refusals() -> Iterator[None]:
    """What an operator must mend ends the start, in one line."""
    try:
        yield
    except (SettingsError, KeyFileError, ModelError, ServiceError) as error:
        _refuse(str(error))
    except (StoreUnavailable, OSError) as error:
        _refuse(f"DATA_DIR: {error} (it must be a folder this user can write, for example DATA_DIR={os.getcwd()}/data)")


def _refuse(line: str) -> NoReturn:
    print(line, file=sys.stderr)
    raise SystemExit(_APP_LOAD_ERROR)
