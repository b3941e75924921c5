"""The log that version 1 kept in files, in tests/audit/version1 as that version wrote it, is taken over once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from audit.log import AuditLog
from audit.verify import verify
from tests.audit.logs import DAY, Log, find, said

SAMPLE = Path(__file__).parent / "version1"


@pytest.fixture
def old(log: Log) -> Log:
    shutil.copytree(SAMPLE, log.folder, dirs_exist_ok=True)
    return log


def opened(old: Log) -> AuditLog:
    """With the head file where version 1 kept it."""
    wall, ticks = (lambda: old.clocks.wall), (lambda: old.clocks.ticks)
    return AuditLog(old.database, old.keys, old.folder, days=old.days, wall=wall, ticks=ticks)


def lines(old: Log) -> list[bytes]:
    files = sorted((SAMPLE / "audit").glob("*.jsonl"))
    return [line for file in files for line in file.read_bytes().splitlines()]


def test_its_records_are_kept_as_they_were_signed_and_the_chain_goes_on(old: Log) -> None:
    audit = opened(old)
    audit.append(said("after"))
    rows = old.rows()
    kept = [row.body[:-1] + f',"mac":"{row.mac}"}}'.encode() for row in rows]
    count = len(lines(old))
    assert count == 8 and kept[:count] == lines(old)
    assert [row.kind for row in rows[count:]] == ["imported", "end", "said", "day"]
    assert [record["outcome"] for record in find(audit, user="ann", kind="end")] == ["stop", "stop", "aborted"]
    assert [record["act"] for record in find(audit, kind="act", request="r0")] == ["login"]
    assert verified(old, audit) == [] and not (old.folder / "audit").exists()
    assert (old.folder / "audit.imported" / "000000000001.jsonl").exists()
    assert (old.folder / "audit-head.old").read_bytes().strip() == (SAMPLE / "audit-head").read_bytes().strip()
    again = opened(old)
    again.append(said("once"))
    assert len(old.rows()) == count + 5 and verified(old, again) == []


def test_an_import_that_was_cut_short_begins_again(old: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as cut, pytest.raises(KeyboardInterrupt):
        cut.setattr("audit.log.AuditLog._timed", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        opened(old).append(said("never"))
    audit = opened(old)
    audit.append(said("after"))
    assert len(old.rows()) == len(lines(old)) + 4 and verified(old, audit) == []


def test_its_age_counts_on(old: Log) -> None:
    audit = opened(old)
    for _ in range(200):
        audit.append(said("day"))
        old.clocks.pass_days(1)
    assert old.rows()[0].seq > 8 and verified(old, audit) == [] and old.clocks.wall > 180 * DAY


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "no head", "other key"])
def test_a_damaged_one_is_not_taken_over_and_stays(old: Log, damage: str) -> None:
    first, *_, last = sorted((old.folder / "audit").glob("*.jsonl"))
    if damage == "flip":
        first.write_bytes(first.read_bytes().replace(b'"user":"ann"', b'"user":"bob"', 1))
    elif damage == "cut":
        last.write_bytes(b"".join(last.read_bytes().splitlines(keepends=True)[:-1]))
    elif damage == "missing":
        first.unlink()
    elif damage == "no head":
        (old.folder / "audit-head").unlink()
    else:
        old.keys = type(old.keys)([b"x" * 32])
    audit = opened(old)
    with capture_logs() as told:
        audit.append(said("after"))
    kinds = [record["kind"] for record in old.records()]
    assert kinds == ["log", "said"] and "not_imported" in old.records()[0]
    assert verified(old, audit) == [] and last.exists()
    assert [line["log_level"] for line in told if "old audit log is damaged" in line["event"]] == ["error"]


def verified(old: Log, audit: AuditLog) -> list[str]:
    return verify(old.database, old.keys, audit.head_path).problems
