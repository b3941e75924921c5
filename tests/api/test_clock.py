"""P15 and P18 where they touch the API: the clock of the machine jumps, and nobody gets in or stays in by that."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from datetime import datetime, tzinfo

import pytest

from api.context import Services
from tests.api.conftest import Client
from tests.faults import Clock

DAY = 86_400


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock(time.time)
    monkeypatch.setattr(time, "time", clock)

    class Shifted(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return cls.fromtimestamp(clock(), tz)

    for library in ("jwt.api_jwt", "flask_jwt_extended.tokens"):  # which ask for a date, and not for the time
        monkeypatch.setattr(f"{library}.datetime", Shifted)
    return clock


@pytest.mark.promise("P18", injected="the clock 200 days ahead, and back", counted="new logins are let in")
def test_a_clock_that_jumps_ahead_ends_sessions_and_revives_none(
    clock: Clock, nobody: Client, counted: Callable[..., None]
) -> None:
    early, revoked = nobody.login(), nobody.login()
    revoked.post("/logout").close()
    clock.offset = 200 * DAY
    ahead = [each.get("/keys").status_code for each in (early, revoked)]
    later = nobody.login()
    assert later.post("/generate", {"prompt": "hi", "temperature": 0}).status_code == 200
    clock.offset = 0
    # One was forgotten as expired and is not expired any more, the other was made in the future.
    back = [each.get("/keys").status_code for each in (revoked, later)]
    counted(refused_tokens=[*ahead, *back].count(401))
    assert (ahead, back) == ([401, 401], [401, 401])
    assert nobody.login().get("/keys").status_code == 200


@pytest.mark.promise("P18", injected="the clock one day back", counted="new logins are let in")
def test_a_clock_that_jumps_back_breaks_nothing(clock: Clock, nobody: Client, counted: Callable[..., None]) -> None:
    before = nobody.login()
    key = Client(nobody.app, before.post("/keys", {"name": "app"}).json["key"])
    clock.offset = -DAY
    statuses = Counter[int]()
    for caller in (before, key):
        for path in ("/generate", "/stream", "/stream/ticket"):
            with caller.post(path, {"prompt": "hi", "temperature": 0}) as answer:
                statuses[answer.status_code] += 1
    counted(requests=statuses.total(), server_errors=sum(statuses[status] for status in statuses if status >= 500))
    assert set(statuses) <= {200, 401}
    now = nobody.login()
    assert now.post("/generate", {"prompt": "hi", "temperature": 0}).status_code == 200
    ticket = now.post("/stream/ticket", {"prompt": "hi"}).json["ticket"]
    with nobody.get("/stream", query_string={"ticket": ticket}) as answer:
        assert answer.status_code == 200


def test_an_expired_ticket_is_none_however_the_clock_got_there(
    clock: Clock, admin: Client, nobody: Client, services: Services
) -> None:
    ticket = admin.post("/stream/ticket", {"prompt": "hi"}).json["ticket"]
    clock.offset = 61
    with nobody.get("/stream", query_string={"ticket": ticket}) as answer:
        assert answer.status_code == 204
