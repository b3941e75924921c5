"""Builds each service once and hands it to the routes: the only file that knows everybody.

Answers no request itself.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, TypeVar

from flask import Flask
from flask_openapi3.models.info import Info
from flask_openapi3.openapi import OpenAPI
from prometheus_flask_exporter import PrometheusMetrics
from werkzeug.middleware.proxy_fix import ProxyFix

from accounts.passwords import Passwords
from accounts.passwords import generate as random_password
from accounts.roles import Role
from accounts.state import State
from accounts.tokens import TokenPolicy
from accounts.users import UserExists, Users
from api import audit_cli as audit_commands
from api import bearer, context, errors, metering, middleware
from api import cli as commands
from api.answers import Answers
from api.context import NAME, Services
from api.places import LOGINS, Places, generations
from api.routes import admin, audit, auth, generate, health, openai, page
from api.running import Running
from api.sanitise import sanitise
from audit.log import AuditLog
from cache.breaker import Breaker
from cache.responses import ResponseCache
from cache.stores import Cache, RedisCache, SqliteCache
from crypto import Box, KeyFileError, derive
from db import Database
from errors import ServiceError, StoreUnavailable
from model.flight import Flights
from model.types import Backend
from model.weights.catalogue import ModelError, find
from olddb import Database as OldDatabase
from quotas.allowances import Allowance, Allowances
from quotas.counts import MemoryLeases, MemoryWindows, SqliteQuotas
from quotas.limits import LoginGuard, RequestRate, StreamLimit, TokenQuota
from quotas.shared_counts import SharedCounts
from secret_files import admin_password, key_ring, read_text, signing_secret
from settings import Settings, SettingsError
from telemetry import Metrics, configure_logging

Made = TypeVar("Made")

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
    context.register(app)
    PrometheusMetrics(app, registry=metrics.registry, group_by="url_rule", metrics_decorator=health.scrapers)
    middleware.register(app)
    metering.register(app)
    errors.register(app)
    bearer.register(app, rooms)
    for room in (health, auth, admin, audit, generate, openai, page):
        app.register_api(room.blueprint)
    app.cli.add_command(commands.users)
    app.cli.add_command(audit_commands.audit)
    if hops := settings.trusted_proxies:
        app.wsgi_app = ProxyFix(app.wsgi_app, x_for=hops, x_proto=hops)  # type: ignore[method-assign]
    return app


def _services(settings: Settings, metrics: Metrics, backend: Backend) -> Services:
    settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    secret, ring = signing_secret(settings), key_ring(settings)
    db = OldDatabase(settings.data_dir / "state.sqlite3")
    database = Database(settings.database_url) if settings.database_url else Database.in_folder(settings.data_dir)
    database.upgrade()
    shared = _shared_counts(settings, metrics)
    cache = ResponseCache(
        _cache(settings, metrics),
        ring.box("cache"),
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
        state=State(db, derive(secret, "api keys")),
        audit=AuditLog(
            database, ring.codes("audit"), settings.data_dir, settings.audit_head, settings.audit_days, metrics
        ),
        contents=ring.box("audit contents"),
        passwords=Passwords(),
        policy=TokenPolicy(NAME, NAME, settings.access_ttl, settings.refresh_ttl, _YEAR),
        jwt_key=derive(secret, "jwt"),
        box=Box(derive(secret, "tickets")),
        allowances=_allowances(settings),
        rate=RequestRate(shared or MemoryWindows()),
        streams=StreamLimit(shared or MemoryLeases()),
        tokens=TokenQuota(shared or SqliteQuotas(db)),
        logins=LoginGuard(shared or MemoryWindows()),
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
    def build(url: str) -> Cache:
        return RedisCache(url, Breaker(on_change=metrics.breaker_open.set))

    found = _at_redis("REDIS_URL", settings.redis_url, settings.redis_url_file, build)
    return found or SqliteCache(settings.data_dir / "cache.sqlite3")


def _shared_counts(settings: Settings, metrics: Metrics) -> SharedCounts | None:
    def build(url: str) -> SharedCounts:
        return SharedCounts(url, Breaker(on_change=metrics.counts_breaker_open.set))

    return _at_redis("STATE_REDIS_URL", settings.state_redis_url, settings.state_redis_url_file, build)


def _at_redis(setting: str, url: str | None, file: Path | None, build: Callable[[str], Made]) -> Made | None:
    """What `build` makes of the address that the setting, or its file, holds; None where there is none."""
    if file is not None:
        setting += "_FILE"
        url = read_text(setting, file)
    try:
        return build(url) if url else None
    except ValueError:  # its words may hold the password
        raise SettingsError(f"{setting}: holds no address of a Redis, such as redis://127.0.0.1:6379/0") from None


def _allowances(settings: Settings) -> Allowances:
    everybody = Allowance(settings.user_streams, settings.user_rpm, settings.user_tokens_per_day)
    return Allowances(everybody, settings.role_limits)


def _first_user(settings: Settings, rooms: Services) -> None:
    if rooms.users.count():
        return
    password = admin_password(settings)
    made = password or random_password()
    try:
        rooms.users.add("admin", Role.ADMIN, rooms.passwords.hash(made))
    except UserExists:
        return  # another process was first
    if not password:
        print(f"First start: sign in as admin with the password {made} (it is not shown again)", file=sys.stderr)


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
