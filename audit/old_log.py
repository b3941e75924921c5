"""Takes over the log that version 1 kept in files: its lines become rows as they were signed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import structlog
from sqlalchemy import Connection, insert

from audit.records import COLUMNS, Event, Head, audit, audit_open, follows
from crypto import MacKeys

_LINE = re.compile(rb'(\{"seq":(\d{1,15}),.*),"mac":"([0-9a-f]{64})"\}\n?')
_SLOT = 512  # the head was kept in two slots, written in turns
_ROWS = 1000  # inserted together
_log = structlog.get_logger("audit")


def take_over(
    connection: Connection, log: str, folder: Path, head_path: Path, keys: MacKeys
) -> tuple[Head, list[Event]]:
    """The head of a log that begins, and its first event. An old log in `folder` is taken in, if it is whole."""
    head, first = Head(log, mac=log, anchor=log), {"kind": "log", "log": log, "clock": 0.0}
    if not folder.is_dir():
        return head, [first]
    step = connection.begin_nested()
    try:
        head = _imported(connection, log, folder, head_path, keys)
        return head, [{"kind": "imported", "log": log, "records": head.seq - head.first + 1}]
    except (OSError, ValueError, KeyError, TypeError) as error:
        step.rollback()
        _log.error("the old audit log is damaged: it was not imported and stays", folder=str(folder), why=str(error))
        return head, [{**first, "not_imported": str(error)}]


def retire(folder: Path) -> None:
    """Put the folder of a log that was taken over aside."""
    with suppress(OSError):
        folder.rename(folder.with_name(f"{folder.name}.imported"))


def _imported(connection: Connection, log: str, folder: Path, head_path: Path, keys: MacKeys) -> Head:
    old = _head(head_path.read_bytes(), keys)
    mac, seq, opened, rows = old["anchor"], old["first"] - 1, dict[str, dict[str, Any]](), []
    for row in _rows(folder, old["first"], old["seq"]):
        if row["seq"] != seq + 1 or not follows(SimpleNamespace(**row), mac, keys):
            raise ValueError(f"record {seq + 1} was changed or is missing")
        seq, mac, body = row["seq"], row["mac"], json.loads(row["body"])
        if body["kind"] == "segment" and body["why"] in ("damaged", "no head"):
            raise ValueError(f"record {seq} says: {body['why']}")
        if body["kind"] == "start":
            opened[body["id"]] = {"id": body["id"], "seq": seq, "writer": body["writer"]}
        elif body["kind"] == "end":
            opened.pop(body["id"], None)
        rows.append({**row, **{name: body.get(name) for name in COLUMNS}})
        if len(rows) == _ROWS or seq == old["seq"]:
            connection.execute(insert(audit), rows)
            rows = []
    if (seq, mac) != (old["seq"], old["tip"]):
        raise ValueError(f"record {old['seq']}, the last, is missing")
    if opened:
        connection.execute(insert(audit_open), list(opened.values()))
    return Head(log, seq, mac, old["first"], old["anchor"], old["clock"], old["opened"], old["time"])


def _head(raw: bytes, keys: MacKeys) -> dict[str, Any]:
    heads = []
    for slot in (raw[:_SLOT], raw[_SLOT:]):
        if match := _LINE.fullmatch(slot.rstrip(b" \0")):
            fields = json.loads(match[1] + b"}")
            row = SimpleNamespace(key=fields["key"], body=match[1] + b"}", mac=match[3].decode())
            heads += [fields] if follows(row, "head", keys) else []
    if not heads:
        raise ValueError("its head is missing, or not signed with a known key")
    found: dict[str, Any] = max(heads, key=lambda head: head["seq"])
    return found


def _rows(folder: Path, first: int, last: int) -> Iterator[dict[str, Any]]:
    """Its lines in order, from the oldest that is kept to the last that the head counts."""
    for path in sorted(path for path in folder.glob("*.jsonl") if first <= int(path.stem) <= last):
        with path.open("rb") as file:
            key = ""
            for line in file:
                match = _LINE.fullmatch(line)
                if match is None:
                    raise ValueError(f"{path.name} holds what is not a record")
                seq, body = int(match[2]), match[1] + b"}"
                key = key or json.loads(body)["key"]
                yield {"seq": seq, "body": body, "key": key, "mac": match[3].decode()}
                if seq == last:
                    return  # what may follow was written by a process that died before it counted it
