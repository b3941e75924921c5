"""Builds each service once and hands it to the routes: the only file that knows all features."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from flask import Flask
from flask_openapi3.models.info import Info
from flask_openapi3.openapi import OpenAPI
from prometheus_flask_exporter import PrometheusMetrics
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.middleware.proxy_fix import ProxyFix

from accounts.credentials import Credentials
from accounts.guard import LoginGuard
from accounts.old_state import import_old_state
from accounts.passwords import Passwords
from accounts.tickets import Tickets
from accounts.tokens import TokenPolicy
from accounts.users import Users
from api import accounts, bearer, cli, context, errors, middleware
from api.context import LOGINS, NAME, Capacity, Services, max_generations
from api.routes import admin, audit, auth, generate, health, openai, page
from api.sanitise import sanitise
from audit.log import AuditLog
from cache.redis_cache import Breaker, RedisLink
from cache.responses import ResponseCache
from cache.sqlite_cache import SqliteCache
from crypto import Encryptor, derive, key_ring, signing_secret
from db import Database
from errors import ServiceError
from model.types import Backend
from model.weights.catalogue import ModelError, find
from quotas.limits import ConcurrencyLimit, Limits, LimitTable, RequestRate
from quotas.usage import UsageStore, import_days
from settings import Settings, SettingsError
from telemetry import Metrics, configure_logging
from version import VERSION

_APP_LOAD_ERROR = 4  # gunicorn's exit status for "do not start again"
_SETTLED_BY = 60  # seconds after REQUEST_TIMEOUT by which every reservation of a living process is settled


def create_app(settings: Settings | None = None, backend: Backend | None = None) -> Flask:
    """The app, ready to serve. Exits with one line on stderr when a setting or the data folder cannot be used."""
    with _refusals():
        settings = settings or Settings.from_environment()
        if cli.is_command():
            cli.require_service(settings)
        _log_to(settings)
        metrics = Metrics()
        services = _services(settings, metrics, backend or _local(settings, metrics))
        if not cli.is_command():
            accounts.add_first_admin(services, settings.admin_password)
    return _flask(settings, services, metrics)


def _flask(settings: Settings, services: Services, metrics: Metrics) -> Flask:
    app = OpenAPI(
        __name__,
        info=Info(title="Flask LLM", version=VERSION),
        security_schemes={"bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}},
        validation_error_callback=errors.invalid,
        validation_error_model=errors.ErrorBody,
        validation_error_status=400,  # every route documents its own; 422 would be added where there is none
        doc_ui=False,
        static_folder=None,
    )
    app.extensions[NAME] = services
    context.register(app)
    PrometheusMetrics(app, registry=metrics.registry, group_by="url_rule", metrics_decorator=health.scrapers)
    middleware.register(app)
    errors.register(app)
    bearer.register(app, services.policy)
    for routes in (health, auth, admin, audit, generate, openai, page):
        app.register_api(routes.blueprint)
    for commands in (cli.users, cli.keys):
        app.cli.add_command(commands)
    if prefix := settings.url_prefix:  # with and without it: a proxy may strip it, and probes ask without
        app.wsgi_app = DispatcherMiddleware(app.wsgi_app, {prefix: app.wsgi_app})  # type: ignore[method-assign]
    if hops := settings.trusted_proxies:
        app.wsgi_app = ProxyFix(app.wsgi_app, x_for=hops, x_proto=hops)  # type: ignore[method-assign]
    return app


def _services(settings: Settings, metrics: Metrics, backend: Backend) -> Services:
    settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    secret, ring, redis = signing_secret(settings), key_ring(settings), _redis(settings, metrics)
    db = Database(settings.database_url) if settings.database_url else Database.in_folder(settings.data_dir)
    db.upgrade()
    import_old_state(db, settings.data_dir / "state.sqlite3", import_days)
    limits = Limits(settings.user_streams, settings.user_rpm, settings.user_tokens_per_day)
    return Services(
        settings=settings,
        model=find(settings).name,
        backend=backend,
        database=db,
        cache=ResponseCache(
            redis or SqliteCache(settings.data_dir / "cache.sqlite3"),
            ring.encryptor("cache"),
            derive(secret, "cache key"),
            settings.cache_ttl,
            lambda result: metrics.cache_lookups.labels(result).inc(),
        ),
        users=Users(db),
        credentials=Credentials(db, derive(secret, "api keys"), settings.refresh_ttl),
        audit=AuditLog(
            db, ring.mac_keys("audit"), settings.data_dir, settings.audit_head, settings.audit_days, metrics
        ),
        contents=ring.encryptor("audit contents"),
        passwords=Passwords(),
        policy=TokenPolicy(derive(secret, "jwt"), settings.access_ttl, settings.refresh_ttl),
        guard=LoginGuard(
            derive(secret, "devices"), LOGINS, (redis.redis.connection_pool, redis.ask) if redis else None
        ),
        tickets=Tickets(Encryptor(derive(secret, "tickets")), (redis.redis, redis.ask) if redis else None),
        limits=LimitTable(limits, settings.role_limits),
        rate=RequestRate((redis.redis, redis.ask) if redis else None),
        streams=ConcurrencyLimit(),
        usage=UsageStore(db, settings.request_timeout + _SETTLED_BY),
        generations=Capacity(max_generations(settings), retry_after=5),
        sanitise=partial(sanitise, policy=settings.sanitise),
    )


def _redis(settings: Settings, metrics: Metrics) -> RedisLink | None:
    if not settings.redis_url:
        return None
    breaker = Breaker()
    metrics.breaker_open.set_function(lambda: breaker.opened)
    link = RedisLink(settings.redis_url, breaker)
    link.ask(link.redis.ping)  # a wrong address or password is logged now, not at the first request
    return link


def _log_to(settings: Settings) -> None:
    try:
        configure_logging(settings.log_level, settings.log_file)
    except OSError as error:
        raise SettingsError(f"LOG_FILE: cannot write {settings.log_file}: {error.strerror}") from None


def _local(settings: Settings, metrics: Metrics) -> Backend:
    from model.local import LocalBackend  # only here: it takes a second, which no command that needs no model should

    return LocalBackend(settings, metrics)


@contextmanager
def _refusals() -> Iterator[None]:
    """What an operator must mend ends the start, in one line."""
    try:
        yield
        return
    except (SettingsError, ModelError) as error:
        line = str(error)
    except (ServiceError, OSError) as error:
        line = f"DATA_DIR: {error} (it must be a folder this user can write, for example DATA_DIR={os.getcwd()}/data)"
    print(line, file=sys.stderr)
    raise SystemExit(1 if cli.is_command() else _APP_LOAD_ERROR)
