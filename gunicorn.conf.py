"""How gunicorn serves: one process, because there is one copy of the weights, and many threads that wait for it.

Reads no environment of its own; settings.py does.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import socket
import sys
import threading
from typing import Any

from gunicorn.arbiter import Arbiter  # type: ignore[import-untyped]
from gunicorn.config import Config  # type: ignore[import-untyped]
from gunicorn.glogging import Logger  # type: ignore[import-untyped]

from api.context import NAME, Services
from api.places import LOGINS, generations
from api.worker import CONNECTIONS, LEAVING, PatientWorker
from errors import StoreUnavailable
from settings import Settings, SettingsError
from telemetry import configure_logging

try:
    settings = Settings.from_environment()
except SettingsError as error:
    print(error, file=sys.stderr)
    sys.exit(1)


def _connections(wanted: int) -> int:
    """As many as there may be open files for, with some left for databases, models and the compiler.

    gunicorn's worker dies, and with it the model, when it accepts one too many.
    """
    files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < wanted + 512:
        files = wanted + 512 if hard == resource.RLIM_INFINITY else min(wanted + 512, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    return wanted if files == resource.RLIM_INFINITY else min(wanted, files - 512)


bind = f"[{settings.host}]:{settings.port}" if ":" in settings.host else f"{settings.host}:{settings.port}"
worker_class = PatientWorker
workers = 1
LAST_WORDS = 2.0  # seconds
# Generations and logins hold a thread while they run or wait, and api/places.py bounds both; everything else is short,
# and among the threads left over health finds one free.
threads = generations(settings.slots, settings.max_queue) + LOGINS + 16
worker_connections = _connections(threads + CONNECTIONS + LEAVING)
preload_app = False  # never fork after torch's threads have started
control_socket_disable = True
timeout = 120  # the main loop only accepts; importing and loading may hold it up
graceful_timeout = int(settings.grace_period) + 8  # over the grace that running streams are given
limit_request_field_size = 16_384  # so that an absurd token is a 401 and not a dropped line
forwarded_allow_ips = ""  # the app's TRUSTED_PROXIES decides whom to believe


class _Log(Logger):  # type: ignore[misc]
    """gunicorn's lines in the service's log; it writes none for each request, because the app does."""

    def setup(self, cfg: Config) -> None:
        super().setup(cfg)
        configure_logging(settings.log_level)  # the worker alone writes to LOG_FILE, which it may then rotate
        self.error_log.handlers.clear()
        self.error_log.propagate = True


logger_class = _Log


def on_starting(server: Any) -> None:
    """A busy port is one line, not five retries."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except (OSError, UnicodeError) as error:
            print(_unusable(error), file=sys.stderr)
            sys.exit(1)


def _unusable(error: OSError | UnicodeError) -> str:
    number, reason = getattr(error, "errno", None), getattr(error, "strerror", "not a name")
    if number == errno.EADDRINUSE:
        reason = "is in use: stop what listens there, or choose another"
    elif number != errno.EACCES:
        return f"HOST: {settings.host} is no address of this machine: {reason} (for example HOST=127.0.0.1)"
    return f"PORT: {settings.host}:{settings.port} {reason} (for example PORT=5001)"


def post_worker_init(worker: Any) -> None:
    """On SIGTERM the service drains while it still accepts, so that newcomers hear 503 instead of nothing.

    With PRELOAD it loads now; a model that cannot be loaded ends the service the same way.
    """
    backend = _services(worker).backend
    _open_audit(_services(worker))

    def drain() -> None:
        backend.close(settings.grace_period)
        worker.handle_exit(signal.SIGTERM, None)

    def stop(*_: object) -> None:
        threading.Thread(target=drain, name="drain", daemon=True).start()

    def give_up(line: str) -> None:
        print(f"MODEL={settings.model} cannot be served: {line}", file=sys.stderr)
        worker.gave_up = True
        stop()

    def start_again(line: str) -> None:
        """Only a new process heals a thread that hangs in native code; its readers get a moment to hear of it."""
        print(f"MODEL={settings.model} hangs ({line}): this process ends and another one starts", file=sys.stderr)
        threading.Timer(LAST_WORDS, os._exit, (1,)).start()

    signal.signal(signal.SIGTERM, stop)
    backend.watch(start_again)
    worker.most = settings.max_body
    if settings.preload:
        backend.preload(give_up)


def _open_audit(rooms: Services) -> None:
    """Close what the process before this one left open, if it died; a log that cannot be written is told at once."""
    try:
        rooms.audit.open()
    except StoreUnavailable as error:
        print(f"DATA_DIR: {error}; until it can, requests are answered with 503", file=sys.stderr)


def worker_exit(server: Any, worker: Any) -> None:
    """A restart would meet the same model: this status ends the master too, with the same one."""
    if getattr(worker, "gave_up", False):
        sys.exit(Arbiter.APP_LOAD_ERROR)


def worker_int(worker: Any) -> None:
    """On Ctrl-C nothing is waited for, but every stream still ends in words."""
    ending = threading.Thread(target=_services(worker).backend.close, args=(0,), daemon=True)
    ending.start()
    ending.join(2)


def _services(worker: Any) -> Services:
    services: Services = worker.wsgi.extensions[NAME]
    return services
