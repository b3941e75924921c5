"""How gunicorn serves: one process, because there is one copy of the weights, and many threads that wait for it."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import struct
import sys
import threading
from contextlib import suppress
from http import HTTPStatus
from typing import Any

from gunicorn.arbiter import Arbiter  # type: ignore[import-untyped]
from gunicorn.glogging import Logger  # type: ignore[import-untyped]
from gunicorn.http.errors import LimitRequestHeaders, LimitRequestLine, ParseException  # type: ignore[import-untyped]
from gunicorn.util import close_graceful  # type: ignore[import-untyped]
from gunicorn.workers.gthread import ThreadWorker  # type: ignore[import-untyped]

from api.context import LOGINS, NAME, Services, max_generations
from api.errors import payload
from errors import Malformed, StoreUnavailable
from settings import Settings, SettingsError, check
from telemetry import configure_logging

try:
    settings = Settings.from_environment()
except SettingsError as error:
    sys.exit(str(error))

STALLED_READ, STALLED_WRITE = 10, 20  # seconds without a byte; nginx gives a whole body 10, too
UNREAD = 16 << 10  # bytes that may wait for a reader that has stopped: with megabytes it would hold its slot
SHUTDOWN_DELAY = 2.0  # seconds in which clients may read why, before a process whose model hangs is replaced


class Worker(ThreadWorker):  # type: ignore[misc]
    """gthread, with errors in our shape that do not quote what was sent, and whose main loop waits for no client."""

    def handle(self, conn: Any) -> Any:
        kept = super().handle(conn)
        if not kept:  # gunicorn lets clients read our last bytes on the loop that accepts: there it then ends at once
            with suppress(OSError):
                close_graceful(conn.sock.dup(), max_drain=sys.maxsize)
                conn.sock.shutdown(socket.SHUT_RD)
        return kept

    def handle_error(self, req: Any, client: socket.socket, addr: Any, error: Exception) -> None:
        if not isinstance(error, ParseException):
            super().handle_error(req, client, addr, error)
            return
        self.log.warning("not a request: %s", type(error).__name__)
        known = {LimitRequestHeaders: (431, "headers_too_large"), LimitRequestLine: (414, "uri_too_long")}
        status, code = known.get(type(error), (400, "malformed"))
        phrase = HTTPStatus(status).phrase
        body = json.dumps(payload(Malformed(f"This cannot be read as HTTP: {phrase}.", code=code), None))
        head = f"HTTP/1.1 {status} {phrase}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        with suppress(OSError):  # it is gone, or does not read
            client.sendall(f"{head}Cache-Control: no-store\r\nConnection: close\r\n\r\n{body}".encode())


class _Log(Logger):  # type: ignore[misc]
    """gunicorn's lines in the service's log; it writes none for each request, because the app does."""

    def setup(self, cfg: Any) -> None:
        super().setup(cfg)
        configure_logging(settings.log_level)  # the worker alone writes to LOG_FILE, which it may then rotate
        self.error_log.handlers.clear()
        self.error_log.propagate = True

    def exception(self, msg: str, *args: Any, **kwargs: Any) -> None:
        if isinstance(sys.exc_info()[1], BlockingIOError | TimeoutError):
            self.info("a client was too slow")
        else:
            super().exception(msg, *args, **kwargs)


bind = f"[{settings.host}]:{settings.port}" if ":" in settings.host else f"{settings.host}:{settings.port}"
worker_class = Worker
workers = 1
# Generations and logins hold a thread while they run or wait; the rest is short, and finds one of 16.
threads = max_generations(settings) + LOGINS + 16
worker_connections = threads + 1000
preload_app = False  # never fork after torch's threads have started
control_socket_disable = True
timeout = 120  # the main loop only accepts; importing and loading may hold it up
graceful_timeout = int(settings.grace_period) + 8  # over the grace that running streams are given
limit_request_field_size = 16_384  # an absurd token is a 401 and not a dropped connection
forwarded_allow_ips = ""  # the app's TRUSTED_PROXIES decides
logger_class = _Log

# gunicorn dies when it accepts one connection too many; 512 files are for databases, models and the compiler.
_files, _most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
if 0 <= _files < worker_connections + 512:
    _files = worker_connections + 512 if _most_files < 0 else min(worker_connections + 512, _most_files)
    resource.setrlimit(resource.RLIMIT_NOFILE, (_files, _most_files))
    worker_connections = _files - 512


def on_starting(server: Any) -> None:
    """What this machine does not allow ends the start in one line."""
    try:
        check(settings)
    except SettingsError as error:
        sys.exit(str(error))


def post_worker_init(worker: Any) -> None:
    """On SIGTERM readiness fails first and new requests get 503, while running streams end; then gunicorn stops."""
    services = _services(worker)
    for listener in worker.sockets:  # connections inherit these
        listener.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", STALLED_READ, 0))
        listener.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNREAD)
        listener.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALLED_WRITE * 1000)
    try:
        services.audit.open()  # closes what a process that died left open
    except StoreUnavailable as error:
        print(f"DATA_DIR: {error}; until it can, requests are answered with 503", file=sys.stderr)

    def drain() -> None:
        services.backend.close(settings.grace_period)
        worker.handle_exit(signal.SIGTERM, None)

    def stop(*_: object) -> None:
        threading.Thread(target=drain, name="drain", daemon=True).start()

    def give_up(line: str) -> None:
        print(f"MODEL={settings.model} cannot be served: {line}", file=sys.stderr)
        worker.gave_up = True
        stop()

    def start_again(line: str) -> None:
        """Only a new process heals a thread that hangs in native code."""
        print(f"MODEL={settings.model} hangs ({line}): this process ends and another one starts", file=sys.stderr)
        threading.Timer(SHUTDOWN_DELAY, os._exit, (1,)).start()

    signal.signal(signal.SIGTERM, stop)
    services.backend.watch(start_again)
    if settings.preload:
        services.backend.preload(give_up)
    if not settings.trusted_proxies:  # else people come by the proxy's address, which is not known here
        print(_welcome(settings), file=sys.stderr)


def _welcome(settings: Settings) -> str:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host.replace("0.0.0.0", "127.0.0.1")
    loads = "is loading" if settings.preload else "loads with the first question"
    return f"Open http://{host}:{settings.port}{settings.url_prefix}, sign in as admin; the model {loads}."


def worker_exit(server: Any, worker: Any) -> None:
    """A restart would meet the same model: this status ends the master too, with the same one."""
    if getattr(worker, "wsgi", None):
        _services(worker).usage.close()
    if getattr(worker, "gave_up", False):
        sys.exit(Arbiter.APP_LOAD_ERROR)


def worker_int(worker: Any) -> None:
    """On Ctrl-C nothing is waited for, but every stream still ends with an error event."""
    ending = threading.Thread(target=_services(worker).backend.close, args=(0,), daemon=True)
    ending.start()
    ending.join(2)


def _services(worker: Any) -> Services:
    services: Services = worker.wsgi.extensions[NAME]
    return services
