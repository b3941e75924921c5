"""Revocation, refresh families, API keys and tickets."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from accounts.state import ApiKey, State, Ticket

from errors import StoreUnavailable
from olddb import Database

SECRET = b"key"
NOW = 1_800_000_000.0
KEY = ApiKey("k1", "ann", "my laptop", ("generate", "models"), "user", NOW, NOW + 1000)


@pytest.fixture
def db(tmp_path: Path) -> Database:
    return Database(tmp_path / "state.db")


@pytest.fixture
def state(db: Database) -> State:
    return State(db, SECRET)


def test_a_revoked_token_stays_revoked_and_only_that_one(db: Database, state: State, tmp_path: Path) -> None:
    state.revoke("j1", NOW + 10, NOW)
    state.revoke("j1", NOW + 10, NOW)
    db.close()
    again = State(Database(tmp_path / "state.db"), SECRET)
    assert again.is_revoked("j1") and not again.is_revoked("j2")


def test_revocations_are_forgotten_once_they_no_longer_matter(db: Database, state: State) -> None:
    for i in range(100):
        state.revoke(f"j{i}", NOW + i, NOW + i - 1)
    assert db.rows("SELECT count(*) FROM revoked")[0][0] == 1


def test_a_refresh_token_is_good_once(state: State) -> None:
    family = state.start_family("r1", "ann", NOW + 10, NOW)
    assert state.rotate("r1", "r2", NOW + 10, NOW) == family
    assert state.rotate("r2", "r3", NOW + 10, NOW) == family
    assert state.family_alive(family, NOW)


def test_a_reused_refresh_token_ends_its_family_and_no_other(state: State) -> None:
    family, other = state.start_family("r1", "ann", NOW + 10, NOW), state.start_family("s1", "ann", NOW + 10, NOW)
    state.rotate("r1", "r2", NOW + 10, NOW)
    assert state.rotate("r1", "r3", NOW + 10, NOW) is None
    assert state.rotate("r2", "r4", NOW + 10, NOW) is None, "the thief's, or the victim's, is dead too"
    assert not state.family_alive(family, NOW) and state.family_alive(other, NOW)


def test_unknown_expired_and_logged_out_refresh_tokens_are_refused(state: State) -> None:
    assert state.rotate("nobody's", "r2", NOW + 10, NOW) is None
    family = state.start_family("r1", "ann", NOW + 10, NOW)
    assert state.rotate("r1", "r2", NOW + 20, NOW + 10) is None and not state.family_alive(family, NOW + 10)
    assert state.family_alive(family, NOW)
    state.end_family(family)
    assert state.rotate("r1", "r2", NOW + 10, NOW) is None and not state.family_alive(family, NOW)


def test_of_many_refreshes_at_once_exactly_one_wins(state: State) -> None:
    for round in range(5):
        family = state.start_family(f"r{round}", "ann", NOW + 10, NOW)

        def refresh(i: int, jti: str = f"r{round}") -> str | None:
            return state.rotate(jti, f"{jti}-{i}", NOW + 10, NOW)

        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(refresh, range(8)))
        assert sorted(filter(None, results)) == [family]


def test_expired_refresh_tokens_are_forgotten(db: Database, state: State) -> None:
    for i in range(100):
        state.start_family(f"r{i}", "ann", NOW + i, NOW + i - 1)
    assert db.rows("SELECT count(*) FROM refresh_tokens")[0][0] == 1


def test_a_key_works_until_it_is_revoked_or_expires(state: State) -> None:
    state.add_key("jti-1", KEY)
    assert state.use_key("jti-1", NOW) == KEY
    assert state.use_key("jti-2", NOW) is None and state.use_key("k1", NOW) is None
    assert state.use_key("jti-1", NOW + 1000) is None
    assert state.revoke_key("k1", "ann") and not state.revoke_key("k1", "ann")
    assert state.use_key("jti-1", NOW) is None
    assert [key.revoked for key in state.keys("ann")] == [True]


def test_keys_belong_to_their_owner(state: State) -> None:
    state.add_key("jti-1", KEY)
    state.add_key("jti-2", replace(KEY, id="k2", created=NOW + 1))
    state.add_key("jti-3", replace(KEY, id="k3", owner="bob"))
    assert [key.id for key in state.keys("ann")] == ["k1", "k2"]
    assert not state.revoke_key("k3", "ann")
    assert state.use_key("jti-3", NOW) is not None


def test_the_last_use_is_noted_once_a_minute(state: State) -> None:
    state.add_key("jti-1", KEY)
    seen = []
    for second in (1, 30, 60.5, 61, 70, 121.5):
        state.use_key("jti-1", NOW + second)
        seen.append(state.keys("ann")[0].last_used)
    assert [at - NOW for at in seen if at is not None] == [1, 1, 1, 61, 61, 121.5]


def test_expired_keys_are_forgotten_when_another_is_made(state: State) -> None:
    state.add_key("jti-1", KEY)
    state.add_key("jti-2", replace(KEY, id="k2", created=NOW + 1000, expires=NOW + 2000))
    assert [key.id for key in state.keys("ann")] == ["k2"]


def test_no_secret_is_in_the_file(db: Database, state: State, tmp_path: Path) -> None:
    state.add_key("the-jti-of-a-key", KEY)
    state.put_ticket("the-id-of-a-ticket", "ann", b"sealed", NOW + 60, NOW)
    db.close()
    content = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert b"my laptop" in content and b"the-jti" not in content and b"the-id" not in content


def test_a_ticket_is_taken_once(state: State) -> None:
    state.put_ticket("t1", "ann", b"sealed \x00 body", NOW + 60, NOW)
    assert state.take_ticket("t2", NOW) is None
    assert state.take_ticket("t1", NOW + 59) == Ticket("ann", b"sealed \x00 body", NOW + 60)
    assert state.take_ticket("t1", NOW + 59) is None


def test_an_expired_ticket_is_none_and_forgotten(db: Database, state: State) -> None:
    state.put_ticket("t1", "ann", b"", NOW + 60, NOW)
    assert state.take_ticket("t1", NOW + 60) is None
    for i in range(50):
        state.put_ticket(f"u{i}", "ann", b"", NOW + i, NOW + i - 1)
    assert db.rows("SELECT count(*) FROM tickets")[0][0] == 1


def test_two_processes_never_take_the_same_ticket(state: State, tmp_path: Path) -> None:
    tickets = [f"t{i}" for i in range(40)]
    for ticket in tickets:
        state.put_ticket(ticket, ticket, b"", NOW + 60, NOW)
    code = "import sys; from pathlib import Path; from olddb import Database; from accounts.state import State; "
    code += "state = State(Database(Path(sys.argv[1])), b'key'); sys.stdin.read(); "
    code += f"print(*(t.owner for i in range(40) if (t := state.take_ticket(f't{{i}}', {NOW}))))"
    ready, go = os.pipe()
    command = [sys.executable, "-c", code, str(tmp_path / "state.db")]
    running = [subprocess.Popen(command, stdin=ready, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    os.close(ready)
    os.close(go)
    taken = [process.communicate(timeout=30)[0].split() for process in running]
    assert sorted(taken[0] + taken[1]) == sorted(tickets)


def test_a_key_works_though_its_use_cannot_be_noted(
    state: State, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    state.add_key("jti", ApiKey("id", "ann", "app", (), "user", 0.0, 1000.0))

    def full(*arguments: object) -> int:
        raise StoreUnavailable("the disk is full")

    monkeypatch.setattr(db, "write", full)
    assert state.use_key("jti", 10.0) is not None
