"""Audit events that are not generations: durable before what they report is done."""

from __future__ import annotations

from flask import has_request_context, request

from api.context import RequestLog, current, services


def record(user: str | None, event: str, **fields: object) -> None:
    """`user` is the actor, None for one that is not known. Raises AuditUnavailable."""
    where = origin(current()) if has_request_context() else {}
    services().audit.append({"kind": event, **where, "user": user, **fields})


def origin(log: RequestLog) -> dict[str, object]:
    """Where a request came from, and with which account and API key."""
    who = {"user_id": log.user_id, "key": log.key}
    return {"request": log.id, **who, "route": log.route, "address": request.remote_addr}
