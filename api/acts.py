"""What people do here beside generating, in the audit log: on record before it is done.

Holds no password, token or text: who, what, and to whose account.
"""

from __future__ import annotations

from secrets import token_hex

from flask import has_request_context, request

from api.context import current, services


def record(by: str | None, act: str, **details: object) -> None:
    """Durable when it returns. `by` is the actor, None for nobody we know. Raises AuditUnavailable."""
    where: dict[str, object] = {}
    if has_request_context():
        trace = current()
        where = {"request": trace.id, "route": trace.route, "address": request.remote_addr}
        if trace.user_id is not None:
            where |= {"user_id": trace.user_id, "by_key": trace.key}
    services().audit.append("act", token_hex(8), {"user": by, "act": act, **where, **details})
