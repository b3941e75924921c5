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
from redis import Redis
from werkzeug.middleware.proxy_fix import ProxyFix

from accounts.credentials import Credentials
from accounts.guard import LoginGuard
from accounts.old_state import import_old_state
from accounts.passwords import Passwords
from accounts.tickets import Tickets
from accounts.tokens import TokenPolicy
from accounts.users import Users
from api import accounts, bearer, context, errors, metering, middleware
from api import audit_cli as audit_commands
from api import cli as commands
from api.answers import Answers
from api.context import NAME, Services
from api.places import LOGINS, Places, generations
from api.routes import admin, audit, auth, generate, health, openai, page
from api.running import Running
from api.sanitise import sanitise
from audit.audit import Audit
from audit.journal import Journal
from audit.tail import Place
from cache.breaker import Breaker
from cache.responses import ResponseCache
from cache.stores import Cache, RedisCache, SqliteCache
from crypto import Encryptor, KeyFileError, KeyRing, derive, key_ring, signing_secret
from db import Database
from errors import ServiceError, StoreUnavailable
from model.flight import Flights
from model.types import Backend
from model.weights.catalogue import ModelError, find
from olddb import Database as OldDatabase
from quotas.allowances import Allowance, Allowances
from quotas.counts import MemoryLeases, MemoryWindows, SqliteQuotas
from quotas.limits import RequestRate, StreamLimit, TokenQuota
from quotas.shared_counts import SharedCounts
from settings import PASSWORD_LONGEST, PASSWORD_SHORTEST, Settings, SettingsError
from telemetry import Metrics, configure_logging

Made = TypeVar("Made")

_APP_LOAD_ERROR = 4  # gunicorn's word for "do not try again"


def create_app(settings: Settings | None = None, backend: Backend | None = None) -> Flask:
    """The app, ready to serve. Exits with one line on stderr when a setting or the data folder is no good.

    Loads no model: the first request does, or PRELOAD, which gunicorn.conf.py sees to.
    """
    with _refusals():
        settings = settings or Settings.from_environment()
        if commands.is_command():
            commands.require_service(settings)
        _log_to(settings)
        metrics = Metrics()
        rooms = _services(settings, metrics, backend or _local(settings, metrics))
        if not commands.is_command():
            accounts.add_first_admin(rooms, _admin_password(settings))
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
    bearer.register(app, rooms.policy)
    for room in (health, auth, admin, audit, generate, openai, page):
        app.register_api(room.blueprint)
    app.cli.add_command(commands.users)
    app.cli.add_command(commands.keys)
    app.cli.add_command(audit_commands.audit)
    if hops := settings.trusted_proxies:
        app.wsgi_app = ProxyFix(app.wsgi_app, x_for=hops, x_proto=hops)  # type: ignore[method-assign]
    return app


def _services(settings: Settings, metrics: Metrics, backend: Backend) -> Services:
    settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    secret, ring = signing_secret(settings), key_ring(settings)
    redis_url = _redis_url("REDIS_URL", settings.redis_url, settings.redis_url_file)
    db = Database(settings.database_url) if settings.database_url else Database.in_folder(settings.data_dir)
    db.upgrade()
    import_old_state(db, settings.data_dir / "state.sqlite3", lambda connection, days: None)
    shared = _shared_counts(settings, metrics)
    cache = ResponseCache(
        _cache(settings, metrics),
        ring.encryptor("cache"),
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
        credentials=Credentials(db, derive(secret, "api keys"), settings.refresh_ttl),
        audit=Audit(Journal(_place(settings, ring), metrics.audited)),
        contents=ring.encryptor("audit contents"),
        passwords=Passwords(),
        policy=TokenPolicy(derive(secret, "jwt"), settings.access_ttl, settings.refresh_ttl),
        guard=LoginGuard(derive(secret, "devices"), LOGINS, redis_url),
        tickets=Tickets(Encryptor(derive(secret, "tickets")), redis_url),
        allowances=_allowances(settings),
        rate=RequestRate(shared or MemoryWindows()),
        streams=StreamLimit(shared or MemoryLeases()),
        tokens=TokenQuota(shared or SqliteQuotas(OldDatabase(settings.data_dir / "quotas.sqlite3"))),
        calls=Places(generations(settings.slots, settings.max_queue), retry_after=5),
        sanitise=sanitise if settings.sanitise == "strip" else str,
    )


def _place(settings: Settings, ring: KeyRing) -> Place:
    """Where the audit log is; its head lies beside the folder of its files, unless it is kept further apart."""
    folder, head = settings.audit_dir or settings.data_dir / "audit", settings.audit_head
    return Place(folder, head or settings.data_dir / "audit-head", ring.mac_keys("audit"), settings.audit_days)


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
    url = _redis_url(setting, url, file)
    return build(url) if url else None


def _redis_url(setting: str, url: str | None, file: Path | None) -> str | None:
    """The address that the setting, or its file, holds. Raises SettingsError."""
    if file is not None:
        setting += "_FILE"
        url = _read_text(setting, file)
    try:
        if url:
            Redis.from_url(url).close()
        return url
    except ValueError:  # its words may hold the password
        raise SettingsError(f"{setting}: holds no address of a Redis, such as redis://127.0.0.1:6379/0") from None


def _admin_password(settings: Settings) -> str | None:
    file = settings.admin_password_file
    if file is None:
        return settings.admin_password
    password = _read_text("ADMIN_PASSWORD_FILE", file)
    if not PASSWORD_SHORTEST <= len(password) <= PASSWORD_LONGEST:
        bounds = f"{PASSWORD_SHORTEST} to {PASSWORD_LONGEST}"
        raise SettingsError(f"ADMIN_PASSWORD_FILE: needs {bounds} characters (for example from: openssl rand -hex 12)")
    return password


def _read_text(setting: str, file: Path) -> str:
    try:
        return file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{setting}: cannot read {file}: {getattr(error, 'strerror', 'not UTF-8')}") from None


def _allowances(settings: Settings) -> Allowances:
    everybody = Allowance(settings.user_streams, settings.user_rpm, settings.user_tokens_per_day)
    return Allowances(everybody, settings.role_limits)


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
    raise SystemExit(1 if commands.is_command() else _APP_LOAD_ERROR)
