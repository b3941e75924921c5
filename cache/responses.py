"""Finished answers, encrypted: reading the store tells nothing, and writing to it plants nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from cache.redis_cache import RedisLink
from cache.sqlite_cache import SqliteCache
from crypto import Encryptor, mac

Part = str | int | float | bool | None | list["Part"] | tuple["Part", ...]


@dataclass(frozen=True, slots=True)
class ResponseCache:
    """JSON objects under keyed names. `on_lookup` is told "hit" or "miss"; `ttl` in seconds, 0 keeps nothing."""

    store: RedisLink | SqliteCache
    encryptor: Encryptor
    mac_key: bytes
    ttl: int
    on_lookup: Callable[[str], None] = lambda result: None

    def problem(self) -> str | None:
        """What is wrong with the store, in a word; it costs hits alone."""
        return self.store.problem()

    def key(self, *parts: Part) -> str:
        """HMAC-SHA256 over the parts as a JSON array: neither 1 and "1" nor ("ab", "c") and ("a", "bc") meet."""
        return mac(self.mac_key, json.dumps(parts, allow_nan=False).encode())

    def get(self, key: str) -> dict[str, object] | None:
        """What was put, or None. A value that does not decrypt under this key, or is no JSON object, is a miss."""
        sealed, value = self.store.get(key), None
        with suppress(ValueError):  # the seal, the encoding or the JSON
            value = sealed and json.loads(self.encryptor.open(sealed, key.encode()))
        found = value if isinstance(value, dict) else None
        self.on_lookup("miss" if found is None else "hit")
        return found

    def put(self, key: str, value: dict[str, object]) -> None:
        self.store.put(key, self.encryptor.seal(json.dumps(value, allow_nan=False).encode(), key.encode()), self.ttl)
