"""A Redis that may fail: bounded waits, a breaker, and the reason while something is wrong."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import redis
import structlog
from redis.backoff import NoBackoff
from redis.exceptions import AskError, ClusterCrossSlotError, ClusterError, NoPermissionError, OutOfMemoryError
from redis.retry import Retry

Reply = TypeVar("Reply")
log = structlog.get_logger("redis")

# A request asks three times (its rate, to look up, to keep) and may wait a quarter of a second in all.
_TIMEOUT = 0.07
# What a server that is down, slow, or no Redis at all can make redis-py raise; its parser trusts what it reads.
_FAULTS = (redis.RedisError, OSError, ValueError, TypeError, LookupError, RecursionError, MemoryError)


class Breaker:
    """Opens after `faults` in a row; every `rest` seconds one probe may try, and its success closes it again."""

    def __init__(self, faults: int = 5, rest: float = 5.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_faults, self._rest, self._clock = faults, rest, clock
        self._faults, self._next_probe = 0, 0.0
        self._lock = threading.Lock()

    @property
    def opened(self) -> bool:
        return self._faults >= self._max_faults

    def allows(self) -> bool:
        """Whether to try now. A probe that never reports back does not block the next one."""
        with self._lock:
            if self.opened and self._clock() < self._next_probe:
                return False
            self._next_probe = self._clock() + self._rest
            return True

    def succeeded(self) -> None:
        with self._lock:
            self._faults = 0

    def failed(self) -> None:
        with self._lock:
            self._faults += 1
            self._next_probe = self._clock() + self._rest


class RedisLink:
    """The Redis at `url`. Raises ValueError for a malformed URL; after that a fault is a miss and never raises.

    `timeout` (seconds) bounds connecting and each reply. A lost connection is tried once more, since Redis may just
    have been restarted; a timeout is not.
    """

    def __init__(self, url: str, breaker: Breaker | None = None, timeout: float = _TIMEOUT) -> None:
        self._breaker = breaker or Breaker()
        self._problems: dict[str, str] = {}  # by command: a full Redis still answers GET
        self._logged: set[str] = set()
        self.redis = redis.Redis.from_url(
            url,
            socket_connect_timeout=timeout,
            socket_timeout=timeout,
            retry=Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
            protocol=2,  # and no driver_info: a new connection then needs no round trips of its own
            driver_info=None,
        )

    def ask(self, command: Callable[[], Reply], name: str = "rate") -> Reply | None:
        """What `command` returns, or None: Redis failed, or the breaker is open. name: under which a fault is kept."""
        if not self._breaker.allows():
            return None
        try:
            reply = command()
        except _FAULTS as fault:
            self._failed(name, fault)
            return None
        self._answered(name)
        return reply

    def get(self, key: str) -> bytes | None:
        value = self.ask(lambda: self.redis.get(key), "get")
        return value if isinstance(value, bytes) else None

    def put(self, key: str, value: bytes, ttl: int) -> None:
        """Keep `value` for `ttl` seconds, unless Redis drops it before; not at all when `ttl` is 0."""
        if ttl > 0:
            self.ask(lambda: self.redis.set(key, value, ex=ttl), "put")

    def problem(self) -> str | None:
        """What is wrong with Redis, as one of _KINDS or certificate; None as far as the last answers tell."""
        return next(iter([*self._problems.values()]), None)

    def close(self) -> None:
        with suppress(*_FAULTS):
            self.redis.close()

    def _answered(self, name: str) -> None:
        if self._breaker.opened:
            log.info("redis answers again")
            self._logged.clear()
            self._problems.clear()
        self._breaker.succeeded()
        self._problems.pop(name, None)

    def _failed(self, name: str, fault: Exception) -> None:
        if not isinstance(fault, redis.ResponseError):  # which is an answer, and comes as fast
            self._breaker.failed()
        kind, advice = next((kind, advice) for types, kind, advice in _KINDS if isinstance(fault, types))
        if isinstance(fault.__context__, ssl.SSLError):
            kind, advice = "certificate", "its certificate is not trusted: ?ssl_ca_certs=FILE in REDIS_URL names a CA"
        self._problems[name] = kind
        if kind not in self._logged:
            self._logged.add(kind)
            log.warning("redis is not used", problem=kind, advice=advice, error=type(fault).__name__)


_KINDS: tuple[tuple[type[Exception] | tuple[type[Exception], ...], str, str], ...] = (
    (redis.AuthenticationError, "password", "it refuses the user or the password in REDIS_URL"),
    (NoPermissionError, "permission", "its ACL forbids a command; ops/make-secrets writes the ACL that is needed"),
    (OutOfMemoryError, "full", "it is full and may not evict: set maxmemory-policy allkeys-lru"),
    ((AskError, ClusterError, ClusterCrossSlotError), "cluster", "it is part of a cluster: name a single server"),
    (redis.TimeoutError, "timeout", f"it does not answer within {_TIMEOUT} s, or speaks no TLS (redis://)"),
    (redis.ConnectionError, "refused", "nothing answers at the address in REDIS_URL, or it wants TLS (rediss://)"),
    (Exception, "protocol", "what answers at REDIS_URL is no Redis that works"),
)
