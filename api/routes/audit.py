"""The audit log for auditors: records by filter and page, exports, and one request with its kept texts."""

from __future__ import annotations

import csv
import io
import json
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from threading import BoundedSemaphore
from typing import Any, Literal

from flask import Response
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from pydantic import BaseModel, ConfigDict, Field

from accounts.roles import Permission
from api.audit_events import record
from api.context import services
from api.errors import ErrorBody
from api.generation_audit import unsealed
from api.middleware import SECURED, Reply, needs, principal
from api.schemas.native import IdPath
from audit.log import AuditFilter, AuditLog
from audit.records import stamp
from errors import NotFound, Overloaded

_COLUMNS = """
    seq time kind id request user user_id key role address route model account outcome cache served_by duration_ms
    parameters tokens raw_sha256 input_sha256 output_sha256 reasoning_sha256 mac
"""
_SEALED = ("input", "output")
_EXPORTED = 100_000  # records in one reply
_PAGE = 500  # records read at a time
_EXPORTING = 300.0  # seconds that one export may take: its thread serves others then
_exports = BoundedSemaphore(2)

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
    kind: str | None = Field(None, max_length=64, description="start, end, login, ...")
    request: str | None = Field(None, max_length=64, description="An X-Request-Id.")
    since: datetime | None = None
    until: datetime | None = None
    after: int = Field(0, ge=0, le=10**15, description="`next` of the page before; in an export its last `seq`.")
    limit: int = Field(100, ge=1, le=1000)
    format: Literal["json", "jsonl", "csv"] = Field(
        "json", description="json: newest first. jsonl, csv: a file, oldest first, of at most 100,000 records."
    )

    def filter(self) -> AuditFilter:
        return AuditFilter(self.user, self.kind, self.request, _stamp(self.since), _stamp(self.until))


class RecordOut(BaseModel):
    """One record; what it holds beside these depends on its kind. `mac` chains it to the one before."""

    model_config = ConfigDict(extra="allow")

    seq: int
    time: str
    kind: str
    mac: str


class RecordsOut(BaseModel):
    records: list[RecordOut]
    next: int | None = Field(description="Send it as `after` for the next page; null when there is none.")


class WordsOut(BaseModel):
    """The texts, where AUDIT_CONTENT kept them; null where not, or where their key is lost."""

    input: Any = None
    output: Any = None


class OneOut(BaseModel):
    records: list[RecordOut]
    words: WordsOut


@blueprint.get("/admin/audit", responses={200: RecordsOut})
@needs(Permission.READ_AUDIT)
def find(query: AuditQuery) -> Reply:
    """Records, newest first; or an export in a file."""
    filters = {f"of_{name}": value for name in ("user", "kind", "request") if (value := getattr(query, name))}
    record(principal().name, "audit read", format=query.format, **filters)
    if query.format != "json":
        return _export(query)
    rows = services().audit.find(query.filter(), query.limit + 1, query.after)
    page = [RecordOut.model_validate(_shown(each)) for each in _records(rows[: query.limit])]
    return RecordsOut(records=page, next=rows[query.limit - 1].seq if len(rows) > query.limit else None).model_dump()


@blueprint.get("/admin/audit/<id>", responses={200: OneOut, 404: ErrorBody})
@needs(Permission.READ_AUDIT)
def one(path: IdPath) -> Reply:
    """One generation's records (`id` as in a record), with its texts where they were kept."""
    record(principal().name, "audit read", of_id=path.id)
    rows = services().audit.find(AuditFilter(request=path.id.rpartition(".")[0]), 1000, newest_first=False)
    found = [each for each in _records(rows) if each.get("id") == path.id]
    if not found:
        raise NotFound("There is no record of this id.", param="id")
    sealed = {part: each[part] for each in found for part in _SEALED if part in each}
    words = {part: unsealed(services().contents, path.id, part, text) for part, text in sealed.items()}
    records = [RecordOut.model_validate(_shown(each)) for each in found]
    return OneOut(records=records, words=WordsOut(**words)).model_dump()


def _records(rows: Iterable[Any]) -> Iterator[dict[str, Any]]:
    for row in rows:
        with suppress(ValueError):  # a body that was tampered with is for `verify` to report
            yield {**json.loads(row.body), "mac": row.mac}


def _shown(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name not in _SEALED}


def _stamp(moment: datetime | None) -> str | None:
    if moment is None:
        return None
    return stamp((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())


def _export(query: AuditQuery) -> Response:
    """A streamed file. At most two at once, each bounded in records and time, so that slow readers hold few threads."""
    if not _exports.acquire(blocking=False):
        raise Overloaded("Two exports are running already.", retry_after=10)
    pages = _exported(services().audit, query.filter(), query.after)
    response = Response(_csv(pages) if query.format == "csv" else _jsonl(pages))
    response.call_on_close(weakref.finalize(response, _exports.release))  # closed or dropped, and once
    response.content_type = "text/csv; charset=utf-8" if query.format == "csv" else "application/jsonl"
    response.headers["Content-Disposition"] = f'attachment; filename="audit.{query.format}"'
    return response


def _exported(log: AuditLog, wanted: AuditFilter, after: int) -> Iterator[Sequence[Any]]:
    ends, count = time.monotonic() + _EXPORTING, 0
    while count < _EXPORTED and (page := log.find(wanted, min(_PAGE, _EXPORTED - count), after, newest_first=False)):
        yield page
        after, count = page[-1].seq, count + len(page)
        if time.monotonic() > ends:
            raise TimeoutError("the client reads this export too slowly")


def _jsonl(pages: Iterator[Sequence[Any]]) -> Iterator[bytes]:
    for page in pages:  # without `mac` each line is the bytes that were signed
        yield b"".join(row.body[:-1] + f',"mac":"{row.mac}"}}\n'.encode() for row in page)


def _csv(pages: Iterator[Sequence[Any]]) -> Iterator[str]:
    text = io.StringIO()
    writer, columns = csv.writer(text), _COLUMNS.split()
    writer.writerow(columns)
    for page in pages:
        writer.writerows([_cell(each.get(name)) for name in columns] for each in _records(page))
        yield text.getvalue()
        text.seek(text.truncate(0))
    yield text.getvalue()


def _cell(value: object) -> object:
    """A cell that no spreadsheet takes for a formula."""
    text = json.dumps(value) if isinstance(value, dict) else value
    return f"'{text}" if isinstance(text, str) and text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
