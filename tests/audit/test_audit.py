"""Finding records again, and closing what dead processes left open."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from audit.audit import Audit, Wanted
from audit.journal import AuditUnavailable
from tests.audit.logs import Log

ROOT = Path(__file__).parents[2]


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path)


def seen(audit: Audit, newest_first: bool = True, **wanted: object) -> list[str]:
    return [record["id"] for record in audit.find(Wanted(**wanted), newest_first) if record["kind"] != "segment"]  # type: ignore[arg-type]


@pytest.fixture
def audit(log: Log) -> Audit:
    """Three requests of two users, over two days."""
    audit = Audit(log.journal())
    for day, (id, user) in enumerate((("r1", "ann"), ("r2", "bob"), ("r3", "ann"))):
        audit.append("start", id, {"user": user, "parameters": {"user": "bob", "note": '"user":"bob"'}})
        audit.append("end", id, {"user": user, "outcome": "stop" if day else "length"})
        log.clocks.pass_days(1)
    return audit


def test_records_are_found_newest_first_or_in_order(audit: Audit) -> None:
    assert seen(audit) == ["r3", "r3", "r2", "r2", "r1", "r1"]
    assert seen(audit, newest_first=False) == ["r1", "r1", "r2", "r2", "r3", "r3"]


def test_filters_are_all_to_be_met(audit: Audit) -> None:
    assert seen(audit, fields={"user": "ann", "kind": "end"}) == ["r3", "r1"]
    assert seen(audit, fields={"user": "ann", "outcome": "length"}) == ["r1"]
    assert seen(audit, fields={"user": "an"}) == [] == seen(audit, fields={"user": '"'})


def test_a_field_is_not_mistaken_for_one_deeper_inside(audit: Audit) -> None:
    assert seen(audit, fields={"user": "bob", "kind": "start"}) == ["r2"]


def test_times_bound_what_is_found(audit: Audit) -> None:
    times = [record["time"] for record in audit.find(Wanted({"kind": "end"}), newest_first=False)]
    assert seen(audit, since=times[1]) == ["r3", "r3", "r2", "r2"]
    assert seen(audit, until=times[1]) == ["r1", "r1"]


def test_before_leads_from_page_to_page(audit: Audit) -> None:
    pages, before = [], 0
    while found := next(audit.find(Wanted({"kind": "end"}, before=before)), None):
        pages.append(found["id"])
        before = found["seq"]
    assert pages == ["r3", "r2", "r1"]


def test_a_spoiled_line_hides_no_other(audit: Audit, log: Log) -> None:
    file = log.files[0]
    file.write_bytes(file.read_bytes().replace(b'"user":"ann"', b'"user":ann"', 1))
    assert "r1" in seen(audit) and "r3" in seen(audit)


@pytest.mark.promise("P12", injected="kill -9 with two requests open", counted="both closed as aborted by the next")
def test_what_a_killed_process_left_open_is_closed(log: Log) -> None:
    code = "import os, sys; from tests.audit.logs import *; from audit.audit import Audit\n"
    code += "audit = Audit(Log(Path(sys.argv[1])).journal())\n"
    code += "for id in ('a', 'b', 'c'): audit.append('start', id, {'user': 'ann', 'route': '/generate'})\n"
    code += "audit.append('end', 'b', {'outcome': 'stop'}); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code, str(log.folder)], cwd=ROOT).returncode == -9
    audit = Audit(log.journal())
    audit.open()
    ends = [record for record in audit.find(Wanted({"kind": "end"}), newest_first=False)]
    assert [(end["id"], end["outcome"]) for end in ends] == [("b", "stop"), ("a", "aborted"), ("c", "aborted")]
    assert all(end.get("user") == "ann" and end["route"] == "/generate" for end in ends[1:])
    assert [record["kind"] for record in log.records()][-1] == "died" and log.whole
    Audit(log.journal()).open()
    assert len(list(audit.find(Wanted({"kind": "end"})))) == 3, "once is enough"


def test_what_a_living_process_has_open_is_left_alone(log: Log) -> None:
    living = Audit(log.journal())
    living.append("start", "a", {})
    Audit(log.journal()).append("start", "b", {})
    assert not list(living.find(Wanted({"kind": "end"})))


def test_a_process_that_ends_in_peace_leaves_no_trace(log: Log) -> None:
    audit = Audit(log.journal())
    audit.append("start", "a", {})
    audit.append("end", "a", {"outcome": "stop"})
    assert len(os.listdir(log.folder / "log" / "writers")) == 1
    del audit
    assert os.listdir(log.folder / "log" / "writers") == []


def test_one_that_ends_with_something_open_counts_as_dead(log: Log) -> None:
    audit = Audit(log.journal())
    audit.append("start", "a", {})
    del audit
    again = Audit(log.journal())
    again.open()
    assert [end["outcome"] for end in again.find(Wanted({"kind": "end"}))] == ["aborted"]


def test_a_log_that_cannot_be_opened_is_refused(log: Log) -> None:
    (log.folder / "log").touch()
    with pytest.raises(AuditUnavailable):
        Audit(log.journal()).open()
