"""Audit events: durable before what they report is done. A generation has two, before its first and last word."""

from __future__ import annotations

import hashlib
import json
import time
from base64 import b64decode, b64encode
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from types import TracebackType
from typing import Any, Self

from flask import has_request_context, request

from accounts.credentials import Principal
from api.context import RequestLog, current, services
from api.schemas.native import ChatMessage
from audit.log import AuditUnavailable
from crypto import SealBroken
from errors import ServiceError
from model.types import Chunk, Done, Event, GenerateRequest, Message


def record(user: str | None, event: str, **fields: object) -> None:
    """`user` is the actor, None for one that is not known. Raises AuditUnavailable."""
    where = _origin(current()) if has_request_context() else {}
    services().audit.append({"kind": event, **where, "user": user, **fields})


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
        self._audit, self._cache, self._began = services().audit, cache, time.monotonic()
        self._contents = services().contents if services().settings.audit_content else None
        self._texts: dict[str, list[str]] = {"answer": [], "reasoning": []}
        self._id, self._ended = wanted.id, False
        self._common = {"id": wanted.id, **_origin(log), "user": log.user, "model": wanted.model}
        chosen = {"max_new_tokens": wanted.max_new_tokens, **asdict(wanted.sampling)}
        raw, cleaned = _plain(sent), _plain(wanted.messages)
        start: dict[str, object] = {
            "kind": "start",
            **self._common,
            "role": caller.role,
            "parameters": {**chosen, "stops": len(wanted.stop)},  # the strings are the user's words
            "raw_sha256": _digest(raw),
            "input_sha256": _digest(cleaned),
            **self._sealed("input", {"raw": raw, "sanitised": cleaned}),
        }
        self._unwritten = [start]

    def write(self, *events: dict[str, object]) -> None:
        """Make the start durable, with what follows it. Raises AuditUnavailable."""
        unwritten, self._unwritten = self._unwritten, []
        self._audit.append(*unwritten, *events)

    def observe(self, event: Event | None) -> None:
        """Take note of an event before it is sent; a Done is durable when it returns. Raises AuditUnavailable."""
        if isinstance(event, Chunk):
            self._texts[event.channel].append(event.text)
        elif isinstance(event, Done):
            self._end(event.finish_reason.value, event)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if isinstance(error, Exception):
            self._end(error.code if isinstance(error, ServiceError) else "internal_error")
            return
        with suppress(AuditUnavailable):  # the client has gone
            self._end("client_gone")

    def _end(self, outcome: str, done: Done | None = None) -> None:
        if self._ended:
            return
        self._ended = True
        figures: dict[str, object] = {}
        if done is not None:
            usage = done.usage
            tokens = {"prompt": usage.prompt_tokens, "completion": usage.completion_tokens}
            tokens |= {"cached": usage.cached_tokens, "reasoning": usage.reasoning_tokens}
            figures = {"served_by": done.served_by, "tokens": tokens}
        texts = {channel: "".join(parts) for channel, parts in self._texts.items()}
        end = {
            "kind": "end",
            **self._common,
            "outcome": outcome,
            "cache": self._cache,
            "output_sha256": hashlib.sha256(texts["answer"].encode()).hexdigest(),
            "reasoning_sha256": hashlib.sha256(texts["reasoning"].encode()).hexdigest(),
            "duration_ms": round((time.monotonic() - self._began) * 1000),
            **figures,
            **self._sealed("output", texts),
        }
        self.write(end)

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
    audit.write()
    return audit


def record_hit(
    wanted: GenerateRequest, sent: Sequence[ChatMessage], caller: Principal, log: RequestLog, events: Sequence[Event]
) -> None:
    """Start and end of a cached answer (the last of `events` is its Done) in one commit. Raises AuditUnavailable."""
    audit = GenerationAudit(wanted, sent, caller, log, "hit")
    for event in events:
        audit.observe(event)


def unsealed(id: str, part: str, sealed: str | None) -> Any:
    """The texts that were kept; None when there are none, or no key of ours opens them."""
    with suppress(SealBroken):
        return sealed and json.loads(services().contents.open(b64decode(sealed), _context(id, part)))
    return None


def _context(id: str, part: str) -> bytes:
    return f"audit:{id}:{part}".encode()


def _origin(log: RequestLog) -> dict[str, object]:
    """Where a request came from, and with which account and API key."""
    who = {"user_id": log.user_id, "key": log.key}
    return {"request": log.id, **who, "route": log.route, "address": request.remote_addr}


def _digest(plain: list[tuple[str, str]]) -> str:
    """SHA-256 of a conversation as [["user","..."],...], compact JSON in UTF-8."""
    return hashlib.sha256(json.dumps(plain, ensure_ascii=False, separators=(",", ":")).encode()).hexdigest()


def _plain(messages: Sequence[ChatMessage | Message]) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in messages]
