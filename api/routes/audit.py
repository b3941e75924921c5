"""The audit log for auditors: records by filter and page, exports, one request with its texts; and `flask audit`."""

from __future__ import annotations

import csv
import io
import json
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from threading import BoundedSemaphore
from typing import Annotated, Any, Literal

import click
from flask import Response
from pydantic import BaseModel, ConfigDict, Field

from accounts.roles import Permission
from api.audit_events import record, unsealed
from api.context import services
from api.errors import ErrorBody
from api.middleware import Reply, api_blueprint, needs, principal
from api.schemas.native import IdPath
from audit.log import AuditFilter, AuditLog
from audit.records import stamp
from audit.verify import verify
from db import Database
from errors import NotFound, Overloaded, StoreUnavailable

_COLUMNS = """
    seq time kind id request user user_id key role address route model account outcome cache served_by duration_ms
    parameters tokens raw_sha256 input_sha256 output_sha256 reasoning_sha256 mac
"""
_SEALED = ("input", "output")
_EXPORTED = 100_000  # records in one reply
_PAGE = 500  # records read at a time
_EXPORTING = 300.0  # seconds that one export may take: its thread serves others then
_exports = BoundedSemaphore(2)

blueprint = api_blueprint("audit", "Audit", 400, 401, 403, 422, 429, 503)
blueprint.cli.help = "Check the audit log."


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


_Records = Annotated[
    list[dict[str, Any]],
    Field(description="seq, time, kind, mac (which chains it to the one before), and what belongs to the kind."),
]


class RecordsOut(BaseModel):
    records: _Records
    next: int | None = Field(description="Send it as `after` for the next page; null when there is none.")


class OneOut(BaseModel):
    records: _Records
    words: dict[str, Any] = Field(description="input, output: as AUDIT_CONTENT kept them; null if not, or unreadable.")


@blueprint.get("/admin/audit", responses={200: RecordsOut})
@needs(Permission.READ_AUDIT)
def find(query: AuditQuery) -> Reply:
    """Records, newest first; or an export in a file."""
    filters = {f"of_{name}": value for name in ("user", "kind", "request") if (value := getattr(query, name))}
    record(principal().name, "audit read", format=query.format, **filters)
    if query.format != "json":
        return _export(query)
    rows = services().audit.find(query.filter(), query.limit + 1, query.after)
    page = [_shown(each) for each in _records(rows[: query.limit])]
    return {"records": page, "next": rows[query.limit - 1].seq if len(rows) > query.limit else None}


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
    words = {part: unsealed(path.id, part, sealed.get(part)) for part in _SEALED}
    return {"records": [_shown(each) for each in found], "words": words}


@blueprint.cli.command("verify")
@click.option("--database", type=click.Path(exists=True, dir_okay=False), help="A copy of an SQLite database to check.")
@click.option("--head", type=click.Path(path_type=Path), help="The head file that belongs to the copy.")
@click.option("--at-least", type=(str, int), metavar="LOG NUMBER", help="What another machine remembers of the log.")
def check(database: str | None, head: Path | None, at_least: tuple[str, int] | None) -> None:
    """Read every record: whether each is as it was written, in its place, and the last one the last. Exit 1 if not."""
    log = services().audit
    source = Database(f"sqlite:///{database}") if database else log.database
    try:
        report = verify(source, log.keys, head or log.head_path, at_least)
    except (StoreUnavailable, OSError) as error:
        raise click.ClickException(f"the audit log cannot be read: {error}") from None
    click.echo(f"log {report.log}: {report.records} records, {report.first} to {report.last}")
    for line in (*report.remarks, *report.problems):
        click.echo(f"  {line}", err=True)
    if report.count:
        raise click.ClickException(f"{report.count} problems: this is not the log that was written")
    click.echo("whole: nothing was changed, left out or cut off")


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
