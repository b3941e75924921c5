"""A disk that fails under the audit log: no answer without its record."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from api.context import Services
from tests.api.audited import WAYS, records, whole
from tests.api.conftest import Client
from tests.audit.logs import Fault, failing_database


@pytest.mark.promise("P13", injected="a full disk, on every route")
@pytest.mark.parametrize("route", list(WAYS))
def test_without_a_record_there_is_no_answer(
    admin: Client, services: Services, backend: Any, counted: Callable[..., None], route: str
) -> None:
    with failing_database(Fault(1, lasts=10**6)):
        refused = admin.post(route, WAYS[route])
        counted(refused=int(refused.status_code == 503), generations=len(backend.submitted))
        assert refused.status_code == 503 and refused.json["error"]["code"] == "audit_unavailable"
        assert refused.headers["Retry-After"] == "5" and not backend.submitted
    assert admin.post(route, WAYS[route]).status_code == 200


@pytest.mark.promise("P13", injected="a full disk under a cached answer")
@pytest.mark.parametrize("route", ["/generate", "/stream"])
def test_a_cache_hit_without_a_record_is_no_answer(
    admin: Client, services: Services, counted: Callable[..., None], route: str
) -> None:
    assert admin.post(route, WAYS[route]).text
    with failing_database(Fault(1, lasts=10**6)):
        refused = admin.post(route, WAYS[route])
        counted(refused=int(refused.status_code == 503), answers=refused.text.count("sky"))
        assert refused.status_code == 503 and "sky" not in refused.text


@pytest.mark.promise("P13", injected="a full disk at the Nth statement or commit, for every N")
def test_no_answer_is_called_finished_without_its_whole_record(
    admin: Client, services: Services, counted: Callable[..., None]
) -> None:
    faults, refused, unrecorded = 0, 0, []
    for at in range(1, 40):
        with failing_database(Fault(at)) as fault:
            answer = admin.post("/generate", {**WAYS["/generate"], "seed": at})
            said = [
                record["kind"] for record in records(services) if record["request"] == answer.headers["X-Request-Id"]
            ]
        if not fault.injected:
            break
        faults += fault.injected
        refused += answer.status_code == 503
        if answer.status_code != 503 and said != ["start", "end"]:
            unrecorded.append((at, said))
    counted(faults=faults, refused=refused, unrecorded_answers=len(unrecorded))
    assert unrecorded == []
    assert fault.injected == 0 and refused >= 6 and whole(services)


@pytest.mark.promise("P13", injected="a disk that fills in the middle of a stream")
def test_a_stream_whose_end_cannot_be_kept_ends_in_an_error(admin: Client, counted: Callable[..., None]) -> None:
    answer = admin.post("/stream", {"prompt": "slow one two three four"})
    with failing_database(Fault(1, lasts=10**6)):
        text = answer.text
    counted(error_event=text.count("event: error"), done_events=text.count("event: done"))
    assert "event: error" in text and "audit_unavailable" in text and "event: done" not in text
