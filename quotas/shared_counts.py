"""The counts behind the limits in a Redis that several processes share.

Decides nothing. Not for a Redis that evicts: a limit that was forgotten is none.

Each step is one script, which Redis runs alone, on its own clock. It is told an id, so that a step whose answer got
lost can be sent again: the second time changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from secrets import token_hex
from typing import TypeVar

from redis.commands.core import Script

from cache.breaker import Breaker
from cache.redis_link import RedisFault, RedisLink
from errors import StoreUnavailable

Reply = TypeVar("Reply")

_LEASE = 60.0  # seconds that a lease lives without being kept up: so long a killed process costs its users streams
_TWO_DAYS = 172_800
_ANY = 1 << 50
_PREFIX = "flask-llm:"

_NOW = "local key, t = KEYS[1], redis.call('TIME') local now = t[1] * 1000000 + t[2]\n"

# A sorted set of hits by their times in microseconds. ARGV: id, window in microseconds, most.
_HIT = f"""{_NOW}
local window, most = tonumber(ARGV[2]), tonumber(ARGV[3])
redis.call('ZREMRANGEBYSCORE', key, '-inf', now - window)
local counted = redis.call('ZSCORE', key, ARGV[1]) or redis.call('ZCARD', key) < most
if counted then
    redis.call('ZADD', key, 'NX', now, ARGV[1])
    redis.call('PEXPIRE', key, math.ceil(window / 1000))
end
local count = redis.call('ZCARD', key)
local at = math.max(count - most, 0)
local blocking = redis.call('ZRANGE', key, at, at, 'WITHSCORES')[2]
return {{counted and 1 or 0, math.max(most - count, 0), blocking + window - now}}"""

# A sorted set of leases by when they end. ARGV: id, life in microseconds, most.
_TAKE = f"""{_NOW}
local life = tonumber(ARGV[2])
redis.call('ZREMRANGEBYSCORE', key, '-inf', now)
local taken = redis.call('ZSCORE', key, ARGV[1]) or redis.call('ZCARD', key) < tonumber(ARGV[3])
if taken then
    redis.call('ZADD', key, now + life, ARGV[1])
    redis.call('PEXPIRE', key, math.ceil(life / 1000))
end
return {{taken and 1 or 0}}"""

_SUMS = """
local key = KEYS[1]
local settled, reserved = unpack(redis.call('HMGET', key, 'settled', 'reserved'))
settled, reserved = tonumber(settled or 0), tonumber(reserved or 0)
"""

# A hash: both sums, and a field for each open bill. ARGV: bill, tokens, most, seconds to live.
_RESERVE = f"""{_SUMS}
if redis.call('HEXISTS', key, ARGV[1]) == 1 then return {{1, settled, reserved}} end
if settled + reserved + ARGV[2] > tonumber(ARGV[3]) then return {{0, settled, reserved}} end
redis.call('HSET', key, ARGV[1], ARGV[2])
redis.call('EXPIRE', key, ARGV[4])
return {{1, settled, redis.call('HINCRBY', key, 'reserved', ARGV[2])}}"""

# ARGV: bill, tokens that were used.
_SETTLE = f"""{_SUMS}
local tokens = redis.call('HGET', key, ARGV[1])
if tokens then
    redis.call('HDEL', key, ARGV[1])
    redis.call('HINCRBY', key, 'reserved', -tokens)
    settled = redis.call('HINCRBY', key, 'settled', ARGV[2])
end
return {{settled}}"""


class SharedCounts:
    """Windows, leases and quotas in the Redis at `url`. Raises ValueError for a malformed URL.

    What lets somebody in raises StoreUnavailable while Redis does not answer. What keeps or gives back does not: a
    lease then ends by itself, and a bill stays as high as it was reserved.
    """

    def __init__(self, url: str, breaker: Breaker | None = None, timeout: float = 0.5) -> None:
        self._link = RedisLink(url, breaker or Breaker(), timeout)
        script = self._link.redis.register_script
        self._hit, self._take, self._reserve, self._settle = map(script, (_HIT, _TAKE, _RESERVE, _SETTLE))

    def hit(self, name: str, most: int, seconds: float) -> tuple[bool, int, float]:
        """Whether it was counted, for how many more there is room, and the seconds until there is more."""
        counted, left, reset = self._run(self._hit, name, token_hex(8), _micro(seconds), most)
        return bool(counted), left, max(reset / 1e6, 0.001)

    def forget(self, name: str) -> None:
        self._quietly(lambda: self._link.redis.delete(_PREFIX + name))

    def take(self, name: str, lease: str, most: int) -> bool:
        """Whether there was room for one more."""
        (taken,) = self._run(self._take, f"streams:{name}", lease, _micro(_LEASE), most)
        return bool(taken)

    def keep(self, name: str, lease: str) -> None:
        with suppress(StoreUnavailable):
            self._run(self._take, f"streams:{name}", lease, _micro(_LEASE), _ANY)

    def give_back(self, name: str, lease: str) -> None:
        self._quietly(lambda: self._link.redis.zrem(f"{_PREFIX}streams:{name}", lease))

    def reserve(self, name: str, day: int, bill: str, tokens: int, most: int) -> tuple[bool, int, int]:
        """Whether they fit, what is settled, and what is reserved, this one among it."""
        granted, settled, reserved = self._run(self._reserve, _day(name, day), bill, tokens, most, _TWO_DAYS)
        return bool(granted), settled, reserved

    def settle(self, name: str, day: int, bill: str, tokens: int) -> None:
        with suppress(StoreUnavailable):
            self._run(self._settle, _day(name, day), bill, tokens)

    def spent(self, name: str, day: int) -> int:
        return self._ask(lambda: int(self._link.redis.hget(_PREFIX + _day(name, day), "settled") or 0))

    def _run(self, script: Script, name: str, *args: str | int) -> list[int]:
        return self._ask(lambda: [int(number) for number in script(keys=[_PREFIX + name], args=args)])

    def _ask(self, command: Callable[[], Reply]) -> Reply:
        try:
            return self._link.ask(command)
        except RedisFault as fault:
            raise StoreUnavailable(f"the state Redis does not answer ({fault})") from fault

    def _quietly(self, command: Callable[[], object]) -> None:
        with suppress(StoreUnavailable):
            self._ask(command)


def _micro(seconds: float) -> int:
    return int(seconds * 1e6)


def _day(name: str, day: int) -> str:
    return f"tokens:{name}:{day}"
