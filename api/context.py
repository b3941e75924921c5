"""What a route works with: the services, each built once, and the log line of the request being answered."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import structlog
from flask import current_app, g

from accounts.credentials import Credentials
from accounts.guard import LoginGuard
from accounts.old_state import import_old_state
from accounts.passwords import Passwords
from accounts.tickets import Tickets
from accounts.tokens import TokenPolicy
from accounts.users import Users
from api.sanitise import sanitise
from audit.log import AuditLog
from cache.redis_cache import Breaker, RedisLink
from cache.responses import ResponseCache
from cache.sqlite_cache import SqliteCache
from crypto import Encryptor, derive, key_ring, signing_secret
from db import Database
from errors import Overloaded, StoreUnavailable
from model.types import Backend
from model.weights.catalogue import find
from quotas.limits import ConcurrencyLimit, Limits, LimitTable, Remaining, RequestRate
from quotas.usage import UsageStore, import_days
from settings import Settings
from telemetry import Metrics

if TYPE_CHECKING:
    from api.generation import Generation

NAME = "flask-llm"
LOGINS = 16  # requests that check a password, running or waiting: two compute a hash at a time
PREPARING = 2  # long prompts being cleaned and tokenised, so that the model thread gets the interpreter's lock
SET_ASIDE = 64 << 20  # bytes of the disk under DATA_DIR for logins, revocations and the ends of what runs
_SETTLED_BY = 60  # seconds after REQUEST_TIMEOUT by which every reservation of a living process is settled


def max_generations(settings: Settings) -> int:
    """Generations that may hold a thread: more than the engine admits, which knows better when to come back."""
    return settings.slots + settings.max_queue + 16


class Capacity:
    """At most `limit` holders at a time; others are refused and told to come back in `retry_after` seconds."""

    def __init__(self, limit: int, retry_after: float = 5) -> None:
        self._free, self._retry_after = threading.BoundedSemaphore(limit), retry_after

    @contextmanager
    def take(self, wait: float = 0.0) -> Iterator[None]:
        """Hold one place inside, after at most `wait` seconds. Raises Overloaded."""
        if not self._free.acquire(timeout=wait):
            raise Overloaded("Too many requests are waiting here already.", retry_after=self._retry_after)
        try:
            yield
        finally:
            self._free.release()


class Services:
    """One of each, as the settings say. Raises SettingsError, ModelError, ServiceError or OSError when one cannot be.

    model: its public name. contents: encrypts what the audit log keeps of prompts and answers. sanitise: a text
    cleaned, and how many elements were removed. generations and preparing bound the threads that each may hold.
    running: the generations under way, by GenerateRequest.id.
    """

    def __init__(self, settings: Settings, metrics: Metrics, backend: Backend) -> None:
        settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        secret, ring, redis = signing_secret(settings), key_ring(settings), _redis(settings, metrics)
        shared = (redis.redis, redis.ask) if redis else None
        self.settings = settings
        self.backend = backend
        self.model = find(settings).name
        self.database = db = _database(settings)
        self.users = Users(db)
        self.passwords = Passwords()
        self.credentials = Credentials(db, derive(secret, "api keys"), settings.refresh_ttl)
        self.policy = TokenPolicy(derive(secret, "jwt"), settings.access_ttl, settings.refresh_ttl)
        self.guard = LoginGuard(derive(secret, "devices"), LOGINS, shared)
        self.tickets = Tickets(Encryptor(derive(secret, "tickets")), shared)
        everybody = Limits(settings.user_streams, settings.user_rpm, settings.user_tokens_per_day)
        self.limits = LimitTable(everybody, settings.role_limits)
        self.rate = RequestRate(shared)
        self.streams = ConcurrencyLimit()
        self.usage = UsageStore(db, settings.request_timeout + _SETTLED_BY)
        self.cache = ResponseCache(
            redis or SqliteCache(settings.data_dir / "cache.sqlite3"),
            ring.encryptor("cache"),
            derive(secret, "cache key"),
            settings.cache_ttl,
            lambda result: metrics.cache_lookups.labels(result).inc(),
        )
        mac, head = ring.mac_keys("audit"), settings.audit_head
        self.audit = AuditLog(db, mac, settings.data_dir, head, settings.audit_days, metrics)
        self.contents = ring.encryptor("audit contents")
        self.sanitise = partial(sanitise, policy=settings.sanitise)
        self.generations = Capacity(max_generations(settings))
        self.preparing = Capacity(PREPARING)
        self.running: dict[str, Generation] = {}

    def check_space(self) -> None:
        """Raises StoreUnavailable while a generation's records would take what is set aside on the disk."""
        if shutil.disk_usage(self.settings.data_dir).free < SET_ASIDE:
            raise StoreUnavailable("the disk is full")


def services() -> Services:
    """The services of the app that answers this request."""
    found: Services = current_app.extensions[NAME]
    return found


def _database(settings: Settings) -> Database:
    db = Database(settings.database_url) if settings.database_url else Database.in_folder(settings.data_dir)
    db.upgrade()
    import_old_state(db, settings.data_dir / "state.sqlite3", import_days)
    return db


def _redis(settings: Settings, metrics: Metrics) -> RedisLink | None:
    if not settings.redis_url:
        return None
    breaker = Breaker()
    metrics.breaker_open.set_function(lambda: breaker.opened)
    link = RedisLink(settings.redis_url, breaker)
    link.ask(link.redis.ping)  # a wrong address or password is logged now, not at the first request
    return link


@dataclass(slots=True)
class RequestLog:
    """The request being answered: what its summary line says, and what is left of the limits that it took from."""

    id: str
    method: str
    route: str | None
    path: str
    started: float = field(default_factory=time.monotonic)
    user: str | None = None
    user_id: str | None = None
    key: str | None = None  # the id of the API key that was used
    generation: Generation | None = None
    error: str | None = None
    remaining: list[Remaining] = field(default_factory=list)

    def write(self, status: int) -> None:
        made, duration = self.generation, round((time.monotonic() - self.started) * 1000, 1)
        done = made and made.done
        _log.info(
            "request", request_id=self.id, method=self.method, route=self.route, path=self.path, status=status,
            duration_ms=duration, user=self.user, user_id=self.user_id, key=self.key, cache=made and made.cache,
            prompt_tokens=done and done.usage.prompt_tokens, completion_tokens=done and done.usage.completion_tokens,
            finish_reason=done and done.finish_reason.value, error=self.error or (made and made.error),
        )  # fmt: skip


_log = structlog.get_logger("request")


def current() -> RequestLog:
    """The log line of the request being answered."""
    found: RequestLog = g.request_log
    return found
