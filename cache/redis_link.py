"""How every Redis is spoken to: bounded, behind a breaker, and with one word for everything that goes wrong.

Knows no command, and not what a fault means to whoever asked.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from cache.breaker import Breaker

Reply = TypeVar("Reply")

# What a server that is down, slow, or no Redis at all can make redis-py raise; its parser trusts what it reads.
_FAULTS = (redis.RedisError, OSError, ValueError, TypeError, LookupError, RecursionError, MemoryError)


class RedisFault(Exception):
    """Redis did not answer, or the breaker is open."""


class RedisLink:
    """A Redis at `url`, left alone by the breaker while it is down. Raises ValueError for a malformed URL.

    `timeout` (seconds) bounds connecting and each reply. A lost connection is tried once more, since Redis may just
    have been restarted; a timeout is not.
    """

    def __init__(self, url: str, breaker: Breaker, timeout: float) -> None:
        self._breaker = breaker
        self.redis = redis.Redis.from_url(
            url,
            socket_connect_timeout=timeout,
            socket_timeout=timeout,
            retry=Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
            protocol=2,  # and no driver_info: a new connection then needs no round trips of its own
            driver_info=None,
        )

    def ask(self, command: Callable[[], Reply]) -> Reply:
        """What `command` returns. Raises RedisFault; what it makes of the reply belongs into it, a reply may be odd."""
        if not self._breaker.allows():
            raise RedisFault("the breaker is open")
        try:
            reply = command()
        except _FAULTS as fault:
            self._breaker.failed()
            raise RedisFault(type(fault).__name__) from fault
        self._breaker.succeeded()
        return reply

    def close(self) -> None:
        with suppress(*_FAULTS):
            self.redis.close()
