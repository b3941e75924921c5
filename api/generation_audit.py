"""One generation in the audit log: its start before the model is asked, its end before the last word is sent."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from api.context import RequestLog
from api.entry import Entry, Turn, begin
from api.middleware import Principal
from model.types import Event, GenerateRequest

GenerationAudit = Entry


def start(
    wanted: GenerateRequest, sent: Sequence[Turn], caller: Principal, log: RequestLog, cache: str | None
) -> GenerationAudit:
    """The audit of a generation whose start is durable. Raises AuditUnavailable."""
    audit = begin(wanted, sent, caller, log)
    audit.cache = cache
    audit.settle()
    return audit


def record_hit(
    wanted: GenerateRequest, sent: Sequence[Turn], caller: Principal, log: RequestLog, events: Iterable[Event]
) -> None:
    """Start and end of a cached answer in one sync. Raises AuditUnavailable."""
    audit = begin(wanted, sent, caller, log)
    audit.cache = "hit"
    for event in events:
        audit.observe(event)
