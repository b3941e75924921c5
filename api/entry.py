"""One generation in the audit log: its start before the model hears of it, its end before anybody hears the last word.

Holds hashes, not words; those go in sealed, and only where AUDIT_CONTENT asks for them.
"""

from __future__ import annotations

import hashlib
import json
import time
from base64 import b64decode, b64encode
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from types import TracebackType
from typing import Any, Protocol

from flask import request

from accounts.credentials import Principal
from api.context import RequestLog, services
from audit.audit import Audit
from audit.journal import AuditUnavailable
from crypto import Encryptor
from errors import ServiceError, StoreUnavailable
from model.types import Chunk, Done, Event, GenerateRequest


class Turn(Protocol):
    """A message as it was sent or as it was cleaned."""

    @property
    def role(self) -> str: ...

    @property
    def content(self) -> str: ...


class Entry:
    """Two records, the first one queued by now. What writes may raise AuditUnavailable: then nothing may be answered.

    As a context: an error that leaves it is how the generation ended, and whoever just leaves went away.
    """

    def __init__(
        self, audit: Audit, contents: Encryptor | None, id: str, common: dict[str, Any], start: dict[str, Any]
    ):
        self._audit, self._contents, self._id, self._common = audit, contents, id, common
        self._began = time.monotonic()
        self._output = {"answer": hashlib.sha256(), "reasoning": hashlib.sha256()}
        self._words: dict[str, list[str]] = {"answer": [], "reasoning": []}
        self._ended = False
        self._start = audit.add("start", id, {**common, **start})
        self.cache: str | None = None

    def settle(self) -> None:
        """The start is durable when this returns."""
        self._audit.settle(self._start)

    def observe(self, event: Event | None) -> None:
        """Take note of what is about to be said."""
        if isinstance(event, Chunk):
            self._output[event.channel].update(event.text.encode())
            if self._contents:
                self._words[event.channel].append(event.text)
        elif isinstance(event, Done):
            usage = event.usage
            tokens = {
                "prompt": usage.prompt_tokens,
                "completion": usage.completion_tokens,
                "cached": usage.cached_tokens,
                "reasoning": usage.reasoning_tokens,
            }
            self._end(event.finish_reason.value, served_by=event.served_by, tokens=tokens)

    def fail(self, error: Exception) -> None:
        """The generation ended in this."""
        if isinstance(error, ServiceError):
            self._end(error.code)
        else:
            self._end("internal_error")

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if isinstance(error, Exception):
            self.fail(error)
            return
        with suppress(AuditUnavailable):  # nobody is there any more to be told
            self._end("client_gone")

    def _end(self, outcome: str, **figures: object) -> None:
        if self._ended:
            return
        self._ended = True
        words = {channel: "".join(texts) for channel, texts in self._words.items()}
        fields = {
            **self._common,
            "outcome": outcome,
            "cache": self.cache,
            "output_sha256": self._output["answer"].hexdigest(),
            "reasoning_sha256": self._output["reasoning"].hexdigest(),
            "duration_ms": round((time.monotonic() - self._began) * 1000),
            **figures,
            **self._sealed("output", words),
        }
        self._audit.append("end", self._id, fields)

    def _sealed(self, part: str, words: object) -> dict[str, str]:
        return seal(self._contents, self._id, part, words)


def begin(wanted: GenerateRequest, sent: Sequence[Turn], caller: Principal, trace: RequestLog) -> Entry:
    """The entry of what `caller` wants; its start is written with the next batch, or when it is settled."""
    rooms, sampling = services(), wanted.sampling
    contents = rooms.contents if rooms.settings.audit_content else None
    common = {
        "request": trace.id,
        "user": caller.name,
        "user_id": caller.user_id,
        "route": trace.route,
        "model": wanted.model,
    }
    parameters = {
        "max_new_tokens": wanted.max_new_tokens,
        **asdict(sampling),
        "stops": len(wanted.stop),  # the strings are the user's words
    }
    start = {
        "role": caller.role,
        "key": caller.key_id,
        "address": request.remote_addr,
        "parameters": parameters,
        "raw_sha256": digest(sent),
        "input_sha256": digest(wanted.messages),
        **seal(contents, wanted.id, "input", {"raw": _plain(sent), "sanitised": _plain(wanted.messages)}),
    }
    return Entry(rooms.audit, contents, wanted.id, common, start)


def digest(turns: Sequence[Turn]) -> str:
    """SHA-256 of a conversation as [["user","..."],...], compact JSON in UTF-8."""
    text = json.dumps(_plain(turns), ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def seal(contents: Encryptor | None, id: str, part: str, words: object) -> dict[str, str]:
    """The field that keeps `words`, if they are to be kept; it opens in its own record only."""
    if contents is None:
        return {}
    return {part: b64encode(contents.seal(json.dumps(words).encode(), _context(id, part))).decode()}


def unseal(contents: Encryptor, id: str, part: str, sealed: str) -> Any:
    """The words that were kept. Raises SealBroken when no key of ours opens them."""
    return json.loads(contents.open(b64decode(sealed), _context(id, part)))


def _context(id: str, part: str) -> bytes:
    return f"audit:{id}:{part}".encode()


def _plain(turns: Sequence[Turn]) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in turns]
