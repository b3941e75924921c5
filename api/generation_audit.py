"""A generation in the audit log: its start before the model is asked, its end before the last word is sent."""

from __future__ import annotations

import hashlib
import json
import time
from base64 import b64decode, b64encode
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from types import TracebackType
from typing import Any, Protocol, Self

from accounts.credentials import Principal
from api.audit_events import origin
from api.context import RequestLog, services
from audit.log import AuditUnavailable
from crypto import Encryptor, SealBroken
from errors import ServiceError
from model.types import Chunk, Done, Event, GenerateRequest


class ChatMessage(Protocol):
    """A message as it was sent or as it was cleaned."""

    @property
    def role(self) -> str: ...

    @property
    def content(self) -> str: ...


class GenerationAudit:
    """The two events of one generation. They hold hashes; the texts only, sealed, where AUDIT_CONTENT asks for them.

    As a context: an error that leaves it is the outcome; leaving without an end is `client_gone`.
    """

    def __init__(
        self,
        wanted: GenerateRequest,
        sent: Sequence[ChatMessage],
        caller: Principal,
        log: RequestLog,
        cache: str | None,
    ) -> None:
        self._audit, self.cache, self._began = services().audit, cache, time.monotonic()
        self._contents = services().contents if services().settings.audit_content else None
        self._hashes = {"answer": hashlib.sha256(), "reasoning": hashlib.sha256()}
        self._texts: dict[str, list[str]] = {"answer": [], "reasoning": []}
        self._ended = False
        self._id = wanted.id
        self._common = {"id": wanted.id, **origin(log), "user": log.user, "model": wanted.model}
        self.first: dict[str, object] = {
            "kind": "start",
            **self._common,
            "role": caller.role,
            "parameters": {
                "max_new_tokens": wanted.max_new_tokens,
                **asdict(wanted.sampling),
                "stops": len(wanted.stop),  # the strings are the user's words
            },
            "raw_sha256": digest(sent),
            "input_sha256": digest(wanted.messages),
            **self._sealed("input", {"raw": _plain(sent), "sanitised": _plain(wanted.messages)}),
        }

    def observe(self, event: Event | None) -> None:
        """Take note of an event before it is sent; a Done is durable when it returns. Raises AuditUnavailable."""
        self.count(event)
        if isinstance(event, Done):
            self._end(event.finish_reason.value, event)

    def count(self, event: Event | None) -> None:
        """Take a piece of the answer into the hashes."""
        if isinstance(event, Chunk):
            self._hashes[event.channel].update(event.text.encode())
            if self._contents:
                self._texts[event.channel].append(event.text)

    def fail(self, error: Exception) -> None:
        """The generation ended in this error. Raises AuditUnavailable."""
        self._end(error.code if isinstance(error, ServiceError) else "internal_error")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if isinstance(error, Exception):
            self.fail(error)
            return
        with suppress(AuditUnavailable):  # the client has gone
            self._end("client_gone")

    def last(self, outcome: str, done: Done | None = None) -> dict[str, object]:
        """The end event."""
        figures: dict[str, object] = {}
        if done is not None:
            usage = done.usage
            tokens = {"prompt": usage.prompt_tokens, "completion": usage.completion_tokens}
            tokens |= {"cached": usage.cached_tokens, "reasoning": usage.reasoning_tokens}
            figures = {"served_by": done.served_by, "tokens": tokens}
        return {
            "kind": "end",
            **self._common,
            "outcome": outcome,
            "cache": self.cache,
            "output_sha256": self._hashes["answer"].hexdigest(),
            "reasoning_sha256": self._hashes["reasoning"].hexdigest(),
            "duration_ms": round((time.monotonic() - self._began) * 1000),
            **figures,
            **self._sealed("output", {channel: "".join(parts) for channel, parts in self._texts.items()}),
        }

    def _end(self, outcome: str, done: Done | None = None) -> None:
        if not self._ended:
            self._ended = True
            self._audit.append(self.last(outcome, done))

    def _sealed(self, part: str, texts: object) -> dict[str, str]:
        if self._contents is None:
            return {}
        sealed = self._contents.seal(json.dumps(texts).encode(), _context(self._id, part))
        return {part: b64encode(sealed).decode()}


def start(
    wanted: GenerateRequest, sent: Sequence[ChatMessage], caller: Principal, log: RequestLog, cache: str | None
) -> GenerationAudit:
    """The audit of a generation whose start is durable. Raises AuditUnavailable."""
    audit = GenerationAudit(wanted, sent, caller, log, cache)
    services().audit.append(audit.first)
    return audit


def record_hit(
    wanted: GenerateRequest, sent: Sequence[ChatMessage], caller: Principal, log: RequestLog, events: Sequence[Event]
) -> None:
    """Start and end of a cached answer (the last of `events` is its Done) in one commit. Raises AuditUnavailable."""
    audit, done = GenerationAudit(wanted, sent, caller, log, "hit"), events[-1]
    assert isinstance(done, Done)
    for event in events:
        audit.count(event)
    services().audit.append(audit.first, audit.last(done.finish_reason.value, done))


def unsealed(contents: Encryptor, id: str, part: str, sealed: str) -> Any:
    """The texts that were kept; None when no key of ours opens them."""
    try:
        return json.loads(contents.open(b64decode(sealed), _context(id, part)))
    except SealBroken:
        return None


def digest(messages: Sequence[ChatMessage]) -> str:
    """SHA-256 of a conversation as [["user","..."],...], compact JSON in UTF-8."""
    text = json.dumps(_plain(messages), ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _context(id: str, part: str) -> bytes:
    return f"audit:{id}:{part}".encode()


def _plain(messages: Sequence[ChatMessage]) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in messages]
