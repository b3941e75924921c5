"""Single-use tickets: a request that waits, encrypted, in Redis or in memory for an EventSource to ask for it."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from secrets import token_urlsafe
from typing import Any, NamedTuple

from redis import Redis

from crypto import Encryptor
from errors import RateLimited, TooLarge

MAX_BYTES = 64 << 10  # of one ticket: a prompt of about 15,000 tokens; longer ones are for POST /stream
MAX_TICKETS = 16  # of one user, at the same time
_MAX_MEMORY = 64 << 20  # bytes of all tickets here; in Redis its own maxmemory bounds them
_TTL = 60  # seconds after which Redis forgets a ticket in any case


class _Ticket(NamedTuple):
    user_id: str
    expires: float
    sealed: bytes


class Tickets:
    """Tickets are kept in Redis while it answers, so that replicas share them; else in memory.

    shared: a client, and RedisLink.ask, which returns None for a command that Redis does not answer.
    """

    def __init__(self, encryptor: Encryptor, shared: tuple[Redis, Callable[..., Any]] | None = None) -> None:
        self._encryptor, self._shared = encryptor, shared
        self._kept: dict[str, _Ticket] = {}
        self._lock = threading.Lock()

    def put(self, user_id: str, content: bytes, expires: float) -> str:
        """The ticket for `content`, good once until `expires` (Unix seconds). Raises TooLarge, RateLimited."""
        if len(content) > MAX_BYTES:
            raise TooLarge(f"A ticket holds at most {MAX_BYTES >> 10} KiB: send longer requests to POST /stream.")
        ticket = token_urlsafe(32)
        name = _name(ticket)
        made = _Ticket(user_id, expires, self._encryptor.seal(content, name.encode()))
        kept = self._ask(_put_in_redis, name, made)
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
        found = found or self._ask(_take_from_redis, name)
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

    def _ask(self, command: Callable[..., Any], *values: object) -> Any:
        if self._shared is None:
            return None
        client, ask = self._shared
        return ask(lambda: command(client, *values), "ticket")


def _put_in_redis(client: Redis, name: str, made: _Ticket) -> bool:
    mine = f"tickets:{made.user_id}"
    client.zremrangebyscore(mine, 0, time.time())
    if client.zcard(mine) >= MAX_TICKETS:
        return False
    with client.pipeline() as all_or_none:
        all_or_none.set(f"ticket:{name}", f"{made.user_id} {made.expires} ".encode() + made.sealed, ex=_TTL)
        all_or_none.zadd(mine, {name: made.expires})
        all_or_none.expire(mine, _TTL)
        all_or_none.execute()
    return True


def _take_from_redis(client: Redis, name: str) -> _Ticket | None:
    value: Any = client.getdel(f"ticket:{name}")
    if value is None:
        return None
    user_id, expires, sealed = bytes.split(value, b" ", 2)
    client.zrem(f"tickets:{user_id.decode()}", name)
    return _Ticket(user_id.decode(), float(expires), sealed)


def _name(ticket: str) -> str:
    return hashlib.sha256(ticket.encode("utf-8", "surrogatepass")).hexdigest()
