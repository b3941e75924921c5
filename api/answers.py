"""Where an answer comes from: the response cache, a twin already in flight, or the model.

Knows no HTTP and no user's rights; whoever calls has checked them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, astuple, dataclass
from typing import Any, Literal

from cache.responses import ResponseCache
from model.flight import Flights
from model.types import Backend, Chunk, Done, Event, FinishReason, GenerateRequest, Stream, Usage

CacheUse = Literal["hit", "miss", "off"]
Reserve = Callable[[GenerateRequest], None]


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer under way, and what the cache had to do with it."""

    stream: Stream
    cache: CacheUse


class Answers:
    """One door to the model. Only deterministic requests are remembered, each for its owner alone unless `shared`."""

    def __init__(self, backend: Backend, flights: Flights, cache: ResponseCache, shared: bool = False) -> None:
        self._backend = backend
        self._flights = flights
        self._cache = cache
        self._shared = shared

    def open(self, request: GenerateRequest, use_cache: bool = True, reserve: Reserve = lambda _: None) -> Answer:
        """Start answering. A hit never reaches the model. Raises what Backend.prepare and submit raise.

        reserve: told of a prepared request that is no hit, before anything is computed for it; may raise.
        """
        prepared = self._backend.prepare(request)
        if not (use_cache and prepared.sampling.deterministic):
            reserve(prepared)
            return Answer(self._backend.submit(prepared), "off")
        key = self._key(prepared)
        if found := self._cache.get(key):
            return Answer(_Replay(found), "hit")
        reserve(prepared)
        stream, _ = self._flights.join(key, prepared, lambda shared: self._recorded(shared, key))
        return Answer(stream, "miss")

    def _recorded(self, request: GenerateRequest, key: str) -> Stream:
        return _Recorded(self._backend.submit(request), self._cache, key)

    def _key(self, request: GenerateRequest) -> str:
        owner = None if self._shared else request.owner
        chosen = (astuple(request.sampling), request.max_new_tokens, request.stop)
        return self._cache.key("answer-1", self._backend.fingerprint(), owner, request.prompt_ids, *chosen)


class _Recorded:
    """A stream that remembers itself once it has ended well."""

    def __init__(self, source: Stream, cache: ResponseCache, key: str) -> None:
        self._source = source
        self._cache = cache
        self._key = key
        self._texts: list[list[str]] = []

    def get(self, timeout: float) -> Event | None:
        event = self._source.get(timeout)
        if isinstance(event, Chunk):
            self._add(event)
        elif isinstance(event, Done) and event.finish_reason is not FinishReason.CANCELLED:
            ending = {"finish_reason": event.finish_reason.value, "usage": asdict(event.usage)}
            self._cache.put(self._key, {"texts": self._texts, "served_by": event.served_by, **ending})
        return event

    def close(self) -> None:
        self._source.close()

    def _add(self, chunk: Chunk) -> None:
        if self._texts and self._texts[-1][0] == chunk.channel:
            self._texts[-1][1] += chunk.text
        else:
            self._texts.append([chunk.channel, chunk.text])


class _Replay:
    """A remembered answer as a stream."""

    def __init__(self, remembered: dict[str, Any]) -> None:
        self._events = _events(remembered)

    def get(self, timeout: float) -> Event | None:
        return next(self._events, None)

    def close(self) -> None:
        """Holds nothing."""


def _events(remembered: dict[str, Any]) -> Iterator[Event]:
    for channel, text in remembered["texts"]:
        yield Chunk(text, channel)
    usage = Usage(**remembered["usage"])
    yield Done(FinishReason(remembered["finish_reason"]), usage, remembered["served_by"])
