"""The SQLite file: private, shared, upgraded, and honest when it cannot answer."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import olddb
from errors import StoreUnavailable
from olddb import Database

ONE = (("CREATE TABLE numbers (n INTEGER PRIMARY KEY)",),)
TWO = (*ONE, ("ALTER TABLE numbers ADD COLUMN note TEXT", "CREATE TABLE more (m TEXT)"))


@pytest.fixture
def db(tmp_path: Path) -> Database:
    return Database(tmp_path / "new folder" / "state.db", ONE)


def numbers(db: Database) -> list[int]:
    return [row["n"] for row in db.rows("SELECT n FROM numbers ORDER BY n")]


def test_the_files_are_private_and_durable(db: Database, tmp_path: Path) -> None:
    db.write("INSERT INTO numbers VALUES (1)")
    files = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "new folder").iterdir()}
    assert files == dict.fromkeys(("state.db", "state.db-wal", "state.db-shm"), 0o600)
    assert db.rows("PRAGMA journal_mode")[0][0] == "wal"
    assert db.rows("PRAGMA synchronous")[0][0] == 2  # FULL


def test_an_open_file_is_made_private(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    path.touch(0o666)
    path.chmod(0o666)
    Database(path, ONE)
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_transaction_is_all_or_nothing(db: Database) -> None:
    with pytest.raises(LookupError), db.transaction() as connection:
        connection.execute("INSERT INTO numbers VALUES (1)")
        raise LookupError
    assert numbers(db) == []
    with db.transaction() as connection:
        connection.execute("INSERT INTO numbers VALUES (2)")
    assert numbers(db) == [2]


def test_threads_take_turns_and_lose_nothing(db: Database) -> None:
    def add_next(_: int) -> None:
        with db.transaction() as connection:
            most = connection.execute("SELECT coalesce(max(n), 0) FROM numbers").fetchone()[0]
            connection.execute("INSERT INTO numbers VALUES (?)", (most + 1,))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add_next, range(80)))
    assert numbers(db) == list(range(1, 81))


def test_processes_may_make_the_same_new_file_at_once(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from olddb import Database; from accounts.users import Users; "
    code += "sys.stdin.read(); Users(Database(Path(sys.argv[1]))).add(sys.argv[2], 'user', 'hash')"
    path = tmp_path / "state.db"
    ready, go = os.pipe()
    running = [subprocess.Popen([sys.executable, "-c", code, str(path), f"u{i}"], stdin=ready) for i in range(5)]
    os.close(ready)
    os.close(go)  # the end of file for which all five wait
    assert [process.wait(30) for process in running] == [0] * 5
    assert Database(path).rows("SELECT count(*) FROM users")[0][0] == 5


def test_a_write_survives_the_death_of_its_process(tmp_path: Path) -> None:
    code = "import os, sys; from pathlib import Path; from olddb import Database; from accounts.state import State; "
    code += "State(Database(Path(sys.argv[1])), b'key').revoke('j1', 2e9, 1e9); os.kill(os.getpid(), 9)"
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "state.db")], timeout=30)
    assert killed.returncode == -9
    assert Database(tmp_path / "state.db").row("SELECT 1 FROM revoked WHERE jti = 'j1'")


def test_an_older_file_is_upgraded_and_a_newer_one_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    Database(path, ONE).write("INSERT INTO numbers VALUES (1)")
    upgraded = Database(path, TWO)
    assert numbers(upgraded) == [1] and upgraded.rows("SELECT note FROM numbers")[0]["note"] is None
    with pytest.raises(StoreUnavailable, match="newer version"):
        Database(path, ONE)


def test_a_failed_upgrade_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    Database(path, ONE)
    with pytest.raises(StoreUnavailable):
        Database(path, (*ONE, ("CREATE TABLE half (h TEXT)", "no such sql")))
    assert Database(path, ONE).rows("SELECT name FROM sqlite_master WHERE name = 'half'") == []


def test_a_file_that_is_no_database_is_unavailable(tmp_path: Path) -> None:
    path = tmp_path / "secret-folder" / "state.db"
    path.parent.mkdir()
    path.write_bytes(b"not a database, but long enough to be read as one" * 100)
    with pytest.raises(StoreUnavailable, match="SQLITE_NOTADB") as failure:
        Database(path, ONE)
    assert "secret-folder" not in str(failure.value), "clients may see the message"


def test_a_place_that_cannot_be_written_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreUnavailable):
        Database(tmp_path / "file" / "state.db", ONE)
    with pytest.raises(StoreUnavailable):
        Database(tmp_path, ONE)


def test_a_full_disk_is_unavailable_and_what_was_there_stays(db: Database) -> None:
    db.write("INSERT INTO numbers VALUES (1)")
    db.rows("PRAGMA max_page_count = 3")  # SQLite's own way to have a small disk
    with pytest.raises(StoreUnavailable, match="SQLITE_FULL"), db.transaction() as connection:
        connection.executemany("INSERT INTO numbers VALUES (?)", ((n,) for n in range(2, 5000)))
    assert numbers(db) == [1]
    db.write("INSERT INTO numbers VALUES (2)")
    assert numbers(db) == [1, 2]


def test_a_read_only_file_is_unavailable_for_writes(db: Database) -> None:
    db.rows("PRAGMA query_only = 1")
    with pytest.raises(StoreUnavailable, match="SQLITE_READONLY"):
        db.write("INSERT INTO numbers VALUES (1)")
    assert numbers(db) == []


def test_a_lock_held_too_long_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(olddb, "_BUSY", 0.05)
    db, other = Database(tmp_path / "state.db", ONE), Database(tmp_path / "state.db", ONE)
    with other.transaction(), pytest.raises(StoreUnavailable, match="SQLITE_BUSY"):
        db.write("INSERT INTO numbers VALUES (1)")
    assert numbers(db) == [], "and reads go on while another writes"
    db.write("INSERT INTO numbers VALUES (1)")


def test_close_closes_the_connections_of_all_threads(db: Database) -> None:
    seen: list[sqlite3.Connection] = []

    def use() -> None:
        with db.transaction() as connection:
            seen.append(connection)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join(10)
    use()
    assert seen[0] is not seen[1], "a connection for each thread"
    db.close()
    for connection in seen:
        with pytest.raises(sqlite3.ProgrammingError, match="closed"):
            connection.execute("SELECT 1")
    assert numbers(db) == [], "a later call opens a new one"
