"""Single-use tickets: a request that waits, encrypted, in Redis or in memory for an EventSource to ask for it."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from base64 import b64decode, b64encode
from collections.abc import Callable
from dataclasses import dataclass
from secrets import token_urlsafe
from typing import Any, TypeVar

from redis import Redis, RedisError
from redis.backoff import NoBackoff
from redis.retry import Retry

from crypto import Encryptor
from errors import RateLimited, TooLarge

Reply = TypeVar("Reply")

MAX_BYTES = 64 << 10  # of one ticket: a prompt of about 15,000 tokens; longer ones are for POST /stream
MAX_TICKETS = 16  # of one user, at the same time
_MAX_MEMORY = 64 << 20  # bytes of all tickets here; in Redis its own maxmemory bounds them
_REST = 5.0  # seconds without Redis after a fault
_TTL = 60  # seconds after which Redis forgets a ticket in any case


@dataclass(frozen=True, slots=True)
class _Ticket:
    user_id: str
    sealed: bytes
    expires: float


class Tickets:
    """A ticket is kept in Redis when there is a `redis_url` and it answers, so that replicas share it; else in memory.

    Raises ValueError for a malformed URL.
    """

    def __init__(self, encryptor: Encryptor, redis_url: str | None = None) -> None:
        self._encryptor = encryptor
        self._kept: dict[str, _Ticket] = {}
        self._lock = threading.Lock()
        self._resting = 0.0
        options: Any = {"socket_connect_timeout": 0.2, "socket_timeout": 0.2, "retry": Retry(NoBackoff(), 1)}
        self._redis = Redis.from_url(redis_url, **options) if redis_url else None

    def put(self, user_id: str, content: bytes, expires: float) -> str:
        """The ticket for `content`, good once until `expires` (Unix seconds). Raises TooLarge, RateLimited."""
        if len(content) > MAX_BYTES:
            raise TooLarge(f"A ticket holds at most {MAX_BYTES >> 10} KiB: send longer requests to POST /stream.")
        ticket = token_urlsafe(32)
        name = _name(ticket)
        made = _Ticket(user_id, self._encryptor.seal(content, name.encode()), expires)
        kept = self._ask(lambda client: _put_in_redis(client, name, made, time.time()))
        if kept is None:
            kept = self._put_in_memory(name, made)
        if not kept:
            raise RateLimited("Too many tickets are waiting to be used: try again in a minute.", retry_after=60)
        return ticket

    def take(self, ticket: str) -> bytes | None:
        """The content of a ticket, once; None for one that is used, expired or was never made."""
        name = _name(ticket)
        with self._lock:
            found = self._kept.pop(name, None)
        found = found or self._ask(lambda client: _take_from_redis(client, name))
        if found is None or found.expires <= time.time():
            return None
        return self._encryptor.open(found.sealed, name.encode())

    def _put_in_memory(self, name: str, made: _Ticket) -> bool:
        with self._lock:
            now = time.time()
            self._kept = {name: kept for name, kept in self._kept.items() if kept.expires > now}
            mine = sum(kept.user_id == made.user_id for kept in self._kept.values())
            if mine >= MAX_TICKETS or sum(len(kept.sealed) for kept in self._kept.values()) >= _MAX_MEMORY:
                return False
            self._kept[name] = made
            return True

    def _ask(self, command: Callable[[Redis], Reply]) -> Reply | None:
        """What Redis replies; None when there is none, or it does not answer."""
        if self._redis is None or time.monotonic() < self._resting:
            return None
        try:
            return command(self._redis)
        except (RedisError, OSError, ValueError, TypeError):
            self._resting = time.monotonic() + _REST
            return None


def _put_in_redis(client: Redis, name: str, made: _Ticket, now: float) -> bool:
    mine = f"tickets:{made.user_id}"
    client.zremrangebyscore(mine, 0, now)
    if client.zcard(mine) >= MAX_TICKETS:
        return False
    value = json.dumps([made.user_id, b64encode(made.sealed).decode(), made.expires])
    with client.pipeline() as all_or_none:
        all_or_none.set(f"ticket:{name}", value, ex=_TTL)
        all_or_none.zadd(mine, {name: made.expires})
        all_or_none.expire(mine, _TTL)
        all_or_none.execute()
    return True


def _take_from_redis(client: Redis, name: str) -> _Ticket | None:
    value: Any = client.getdel(f"ticket:{name}")
    if value is None:
        return None
    user_id, sealed, expires = json.loads(value)
    client.zrem(f"tickets:{user_id}", name)
    return _Ticket(user_id, b64decode(sealed), expires)


def _name(ticket: str) -> str:
    return hashlib.sha256(ticket.encode("utf-8", "surrogatepass")).hexdigest()
