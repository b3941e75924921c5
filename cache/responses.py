"""Whole answers, kept sealed: who reads the cache reads nothing, and who writes it can plant nothing.

Does not decide which answers may be kept, nor what a key must hold; the caller names the parts.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Callable
from typing import Protocol

from cache.stores import Cache

Part = str | int | float | bool | None | list["Part"] | tuple["Part", ...]


class Sealer(Protocol):
    """The part of `crypto.Box` that is needed here; `open` raises a ValueError for a broken seal."""

    def seal(self, plain: bytes, context: bytes) -> bytes: ...

    def open(self, sealed: bytes, context: bytes) -> bytes: ...


class ResponseCache:
    """JSON objects under keyed names. `on_lookup` hears "hit" or "miss"; `ttl` in seconds, 0 keeps nothing."""

    def __init__(
        self,
        cache: Cache,
        box: Sealer,
        mac_key: bytes,
        ttl: int,
        on_lookup: Callable[[str], None] = lambda result: None,
    ) -> None:
        self._cache, self._box, self._mac_key, self._ttl, self._on_lookup = cache, box, mac_key, ttl, on_lookup

    def problem(self) -> str | None:
        return None

    def key(self, *parts: Part) -> str:
        """HMAC-SHA256 over the parts as a JSON array: neither 1 and "1" nor ("ab", "c") and ("a", "bc") meet."""
        return hmac.new(self._mac_key, json.dumps(parts, allow_nan=False).encode(), hashlib.sha256).hexdigest()

    def get(self, key: str) -> dict[str, object] | None:
        """What was put, or None. A value that does not open under this key, or is no JSON object, is a miss."""
        value = self._opened(key)
        self._on_lookup("miss" if value is None else "hit")
        return value

    def put(self, key: str, value: dict[str, object]) -> None:
        context = key.encode()
        self._cache.put(key, self._box.seal(json.dumps(value, allow_nan=False).encode(), context), self._ttl)

    def close(self) -> None:
        self._cache.close()

    def _opened(self, key: str) -> dict[str, object] | None:
        sealed = self._cache.get(key)
        if sealed is None:
            return None
        try:
            value = json.loads(self._box.open(sealed, key.encode()))
        except ValueError:  # the seal, the encoding or the JSON
            return None
        return value if isinstance(value, dict) else None
