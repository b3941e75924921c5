"""The audit log, for auditors: found, exported, and one request with what was said, where that was kept.

Changes nothing; every look is itself on record.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from itertools import islice
from typing import Any, Literal

from flask import Response
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from pydantic import BaseModel, ConfigDict, Field

from accounts.roles import Permission
from api.acts import record
from api.context import services
from api.entry import unseal
from api.errors import ErrorBody
from api.middleware import SECURED, Reply, needs, principal
from api.schemas.native import IdPath
from audit.audit import Wanted
from audit.segments import stamp
from crypto import SealBroken
from errors import NotFound

_FIELDS = """
    seq time kind id request user role token address route model act account outcome cache served_by duration_ms
    parameters tokens raw_sha256 input_sha256 output_sha256 reasoning_sha256 mac
"""
_SEALED = ("input", "output")

blueprint = APIBlueprint(
    "audit",
    __name__,
    abp_tags=[Tag(name="Audit")],
    abp_security=SECURED,
    abp_responses={code: ErrorBody for code in (400, 401, 403, 422, 429, 503)},
)


class AuditQuery(BaseModel):
    """Filters, all optional and all to be met. Times without a zone are UTC."""

    model_config = ConfigDict(extra="forbid")

    user: str | None = Field(None, max_length=64)
    kind: Literal["start", "end", "act", "segment", "died"] | None = None
    act: str | None = Field(None, max_length=64)
    outcome: str | None = Field(None, max_length=64)
    request: str | None = Field(None, max_length=64, description="An X-Request-Id.")
    since: datetime | None = None
    until: datetime | None = None
    before: int = Field(0, ge=0, le=10**15, description="Only records before this one: `next` of the page before.")
    limit: int = Field(100, ge=1, le=1000)
    format: Literal["json", "jsonl", "csv"] = Field(
        "json",
        description="jsonl and csv: all that matches, oldest first; jsonl unfiltered is the log itself.",
    )

    def wanted(self) -> Wanted:
        fields = self.model_dump(include={"user", "kind", "act", "outcome", "request"}, exclude_none=True)
        since, until = (_stamp(moment) for moment in (self.since, self.until))
        return Wanted(fields, since or "", until or "~", self.before)


class RecordOut(BaseModel):
    """One record; what it holds beside these depends on its kind. `mac` chains it to the one before."""

    model_config = ConfigDict(extra="allow")

    seq: int
    time: str
    kind: str
    mac: str


class RecordsOut(BaseModel):
    records: list[RecordOut]
    next: int | None = Field(description="Send it as `before` for the next page; null when there is none.")


class WordsOut(BaseModel):
    """What was said, where AUDIT_CONTENT kept it; null where not, or where its key is lost."""

    input: Any = None
    output: Any = None


class OneOut(BaseModel):
    records: list[RecordOut]
    words: WordsOut


@blueprint.get("/admin/audit", responses={200: RecordsOut})
@needs(Permission.READ_AUDIT)
def find(query: AuditQuery) -> Reply:
    """Records, newest first; or all of them in a file."""
    wanted = query.wanted()
    record(principal().name, "audit read", format=query.format, **{f"of_{k}": v for k, v in wanted.fields.items()})
    if query.format != "json":
        return _export(services().audit.find(wanted, newest_first=False), query.format)
    found = list(islice(services().audit.find(wanted), query.limit + 1))
    page = [RecordOut.model_validate(_shown(each)) for each in found[: query.limit]]
    return RecordsOut(records=page, next=page[-1].seq if len(found) > query.limit else None).model_dump()


@blueprint.get("/admin/audit/<id>", responses={200: OneOut, 404: ErrorBody})
@needs(Permission.READ_AUDIT)
def one(path: IdPath) -> Reply:
    """One request's records (`id` as in a record), with its words where they were kept."""
    record(principal().name, "audit read", of_id=path.id)
    found = list(services().audit.find(Wanted({"id": path.id}), newest_first=False))
    if not found:
        raise NotFound("There is no record of this id.", param="id")
    words = {part: _words(path.id, part, found) for part in _SEALED}
    out = OneOut(records=[RecordOut.model_validate(_shown(each)) for each in found], words=WordsOut(**words))
    return out.model_dump()


def _words(id: str, part: str, records: Iterable[Mapping[str, Any]]) -> Any:
    for sealed in (each[part] for each in records if part in each):
        try:
            return unseal(services().contents, id, part, sealed)
        except SealBroken:
            return None
    return None


def _shown(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name not in _SEALED}


def _stamp(moment: datetime | None) -> str | None:
    if moment is None:
        return None
    return stamp((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())


def _export(records: Iterator[dict[str, Any]], form: str) -> Response:
    lines: dict[str, Callable[[Iterator[dict[str, Any]]], Iterator[str]]] = {"jsonl": _jsonl, "csv": _csv}
    kinds = {"jsonl": "application/jsonl", "csv": "text/csv; charset=utf-8"}
    response = Response(lines[form](records), content_type=kinds[form])
    response.headers["Content-Disposition"] = f'attachment; filename="audit.{form}"'
    return response


def _jsonl(records: Iterator[dict[str, Any]]) -> Iterator[str]:
    for each in records:
        yield json.dumps(each, separators=(",", ":")) + "\n"  # byte for byte the line that is signed


def _csv(records: Iterator[dict[str, Any]]) -> Iterator[str]:
    text = io.StringIO()
    rows = csv.DictWriter(text, _FIELDS.split(), extrasaction="ignore")
    rows.writeheader()
    for each in records:
        rows.writerow({k: json.dumps(v) if isinstance(v, dict) else v for k, v in each.items()})
        yield text.getvalue()
        text.seek(text.truncate(0))
    yield text.getvalue()
