"""Makes the app: the services, handed to the routes."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from flask import Flask
from flask_openapi3.models.info import Info
from flask_openapi3.openapi import OpenAPI
from prometheus_flask_exporter import PrometheusMetrics
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.middleware.proxy_fix import ProxyFix

from api import accounts, bearer, cli, errors, middleware
from api.context import NAME, Services
from api.routes import admin, audit, auth, generate, health, openai, page
from errors import ServiceError
from model.types import Backend
from model.weights.catalogue import ModelError
from settings import Settings, SettingsError, usable
from telemetry import Metrics, configure_logging
from version import VERSION

_APP_LOAD_ERROR = 4  # gunicorn's exit status for "do not start again"


def create_app(settings: Settings | None = None, backend: Backend | None = None) -> Flask:
    """The app, ready to serve. Exits with one line on stderr when a setting or the data folder cannot be used."""
    try:
        settings = settings or Settings.from_environment()
        if cli.is_command():
            cli.require_service(settings)
        with usable("LOG_FILE", "write"):
            configure_logging(settings.log_level, settings.log_file)
        metrics = Metrics()
        services = Services(settings, metrics, backend or _local(settings, metrics))
        if not cli.is_command():
            accounts.add_first_admin(services, settings.admin_password)
    except (SettingsError, ModelError) as error:
        _refuse(str(error))
    except (ServiceError, OSError) as error:
        example = f"for example DATA_DIR={os.getcwd()}/data"
        _refuse(f"DATA_DIR: {error} (it must be a folder this user can write, {example})")
    return _flask(settings, services, metrics)


def _refuse(line: str) -> NoReturn:
    print(line, file=sys.stderr)
    raise SystemExit(1 if cli.is_command() else _APP_LOAD_ERROR)


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
    PrometheusMetrics(app, registry=metrics.registry, group_by="url_rule", metrics_decorator=health.scrapers)
    middleware.register(app)
    errors.register(app)
    bearer.register(app, services.policy)
    for routes in (health, auth, admin, audit, generate, openai):
        app.register_api(routes.blueprint)
    app.register_blueprint(page.blueprint)
    for commands in (cli.users, cli.keys, cli.version):
        app.cli.add_command(commands)
    if prefix := settings.url_prefix:  # with and without it: a proxy may strip it, and probes ask without
        app.wsgi_app = DispatcherMiddleware(app.wsgi_app, {prefix: app.wsgi_app})  # type: ignore[method-assign]
    if hops := settings.trusted_proxies:
        app.wsgi_app = ProxyFix(app.wsgi_app, x_for=hops, x_proto=hops)  # type: ignore[method-assign]
    return app


def _local(settings: Settings, metrics: Metrics) -> Backend:
    from model.local import LocalBackend  # only here: it takes a second, which no command that needs no model should

    return LocalBackend(settings, metrics)
