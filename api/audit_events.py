"""Audit events: durable before what they report is done. A generation has two, before its first and last word."""

from __future__ import annotations

import hashlib
import json
import time
from base64 import b64decode, b64encode
from contextlib import suppress
from dataclasses import asdict
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from flask import has_request_context, request

from accounts.credentials import Principal
from api.context import RequestLog, current, services
from audit.log import AuditUnavailable
from crypto import SealBroken
from errors import ServiceError
from model.types import GenerateRequest

if TYPE_CHECKING:
    from api.generation import Generation


def record(user: str | None, event: str, **fields: object) -> None:
    """`user` is the actor, None for one that is not known. Raises AuditUnavailable."""
    where = _origin(current()) if has_request_context() else {}
    services().audit.append({"kind": event, **where, "user": user, **fields})


class GenerationAudit:
    """The two events of one generation. They hold hashes; the texts only, sealed, where AUDIT_CONTENT asks for them.

    As a context: an error that leaves it is the outcome; leaving without an end is `client_gone`.
    """

    def __init__(self, generation: Generation, caller: Principal, log: RequestLog) -> None:
        self._audit, self._began = services().audit, log.started
        self._contents = services().contents if services().settings.audit_content else None
        self._generation, self._raw, self._role = generation, _plain(generation.request), caller.role
        self._started = self._ended = False
        wanted = generation.request
        self._common = {"id": wanted.id, **_origin(log), "user": log.user, "model": wanted.model}

    def start(self) -> None:
        """Make the start durable. Raises AuditUnavailable."""
        self._started = True
        self._audit.append(self._start())

    def end(self, fault: str | None = None) -> None:
        """Make the end durable, and the start with it where it is not yet; only once. Raises AuditUnavailable."""
        if not self._ended:
            self._ended = True
            self._audit.append(*([] if self._started else [self._start()]), self._end(fault))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if isinstance(error, AuditUnavailable):
            return
        if isinstance(error, Exception):
            self.end(error.code if isinstance(error, ServiceError) else "internal_error")
            return
        with suppress(AuditUnavailable):  # the client has gone
            self.end("client_gone")

    def _start(self) -> dict[str, object]:
        wanted, cleaned = self._generation.request, _plain(self._generation.request)
        chosen = {"max_new_tokens": wanted.max_new_tokens, **asdict(wanted.sampling)}
        return {
            "kind": "start",
            **self._common,
            "role": self._role,
            "parameters": {**chosen, "stops": len(wanted.stop)},  # the strings are the user's words
            "raw_sha256": _digest(self._raw),
            "input_sha256": _digest(cleaned),
            **self._sealed("input", {"raw": self._raw, "sanitised": cleaned}),
        }

    def _end(self, fault: str | None) -> dict[str, object]:
        texts, done = self._generation.texts(), self._generation.done
        figures: dict[str, object] = {}
        if done is not None:
            usage = done.usage
            tokens = {"prompt": usage.prompt_tokens, "completion": usage.completion_tokens}
            tokens |= {"cached": usage.cached_tokens, "reasoning": usage.reasoning_tokens}
            figures = {"served_by": done.served_by, "tokens": tokens}
        return {
            "kind": "end",
            **self._common,
            "outcome": fault or (done and done.finish_reason.value),
            "cache": self._generation.cache,
            "output_sha256": hashlib.sha256(texts["answer"].encode()).hexdigest(),
            "reasoning_sha256": hashlib.sha256(texts["reasoning"].encode()).hexdigest(),
            "duration_ms": round((time.monotonic() - self._began) * 1000),
            **figures,
            **self._sealed("output", texts),
        }

    def _sealed(self, part: str, texts: object) -> dict[str, str]:
        if self._contents is None:
            return {}
        sealed = self._contents.seal(json.dumps(texts).encode(), _context(self._generation.request.id, part))
        return {part: b64encode(sealed).decode()}


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


def _plain(wanted: GenerateRequest) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in wanted.messages]
