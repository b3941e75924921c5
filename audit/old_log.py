"""Takes over the log that version 1 kept in files: its lines become rows as they were signed."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import structlog
from sqlalchemy import Connection, insert

from audit.records import COLUMNS, Event, Head, audit, audit_open, follows
from audit.verify import check_records
from crypto import MacKeys

_LINE = re.compile(rb'(\{"seq":(\d{1,15}),.*),"mac":"([0-9a-f]{64})"\}[ \0\n]*')
_SLOT = 512  # bytes: the head was kept in two slots, written in turns
_log = structlog.get_logger("audit")


def take_over(
    connection: Connection, log: str, folder: Path, head_path: Path, keys: MacKeys
) -> tuple[Head, list[Event]]:
    """The head of a log that begins, and its first event. An old log below `folder` is taken in, if it is whole."""
    new, first = Head(log, mac=log, anchor=log), {"kind": "log", "log": log, "clock": 0.0}
    if not (folder / "audit").is_dir():
        return new, [first]
    old_head = Path(f"{head_path}.old")
    try:
        if not old_head.exists():  # else an import was cut short, and the head file is a new one already
            shutil.copyfile(head_path, old_head)
        with connection.begin_nested():
            old = _head(old_head.read_bytes(), keys)
            _insert(connection, folder / "audit", old)
            values = (old[name] for name in ("seq", "tip", "first", "anchor", "clock", "opened", "time"))
            head = Head(log, *values)
            report = check_records(connection, keys, head)
            if report.count or report.last != head.seq:
                raise ValueError([*report.problems, f"record {head.seq}, the last, is missing"][0])
        return head, [{"kind": "imported", "log": log, "records": report.records}]
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.error("the old audit log is damaged: it was not imported and stays", folder=str(folder), why=str(error))
        return new, [{**first, "not_imported": str(error)}]


def set_aside(folder: Path) -> None:
    """Rename the old log, once what was taken over is durable."""
    with suppress(OSError):
        (folder / "audit").rename(folder / "audit.imported")


def _head(slots: bytes, keys: MacKeys) -> dict[str, Any]:
    """The newer of those that are signed. Raises ValueError for none."""
    found = []
    for slot in (slots[:_SLOT], slots[_SLOT:]):
        with suppress(ValueError, KeyError):
            row, fields = _row(slot)
            found += [fields] if follows(SimpleNamespace(**row), "head", keys) else []
    newest: dict[str, Any] = max(found, key=lambda fields: fields["seq"])
    return newest


def _insert(connection: Connection, folder: Path, old: dict[str, Any]) -> None:
    started = {}
    for path in sorted(path for path in folder.glob("*.jsonl") if old["first"] <= int(path.stem) <= old["seq"]):
        rows, key = [], ""
        for line in path.read_bytes().splitlines():
            row, fields = _row(line, key)
            if row["seq"] > old["seq"]:
                break  # written by a process that died before it counted it
            rows.append(row)
            key = row["key"]
            if fields["kind"] == "start":
                started[fields["id"]] = {name: fields[name] for name in ("id", "seq", "writer")}
            elif fields["kind"] == "end":
                started.pop(fields["id"], None)
        connection.execute(insert(audit), rows)
    if started:
        connection.execute(insert(audit_open), list(started.values()))


def _row(line: bytes, key: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
    """A line as a row, and its fields; it names its own key unless an earlier one of its file has."""
    match = _LINE.fullmatch(line)
    if match is None:
        raise ValueError(f"this is not a record: {line[:40]!r}")
    body = match[1] + b"}"
    fields = json.loads(body)
    row = {"seq": int(match[2]), "body": body, "key": key or fields["key"], "mac": match[3].decode()}
    return {**row, **{name: fields.get(name) for name in COLUMNS}}, fields
