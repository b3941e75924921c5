"""The SQL database: private, durable, all or nothing, migrated once, and honest when it cannot answer."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import text

from db import Database
from errors import StoreUnavailable
from tests.conftest import ROOT


@pytest.fixture
def numbers(database: Database) -> Database:
    """A database with a table of numbers."""
    with database.transaction() as connection:
        connection.execute(text("DROP TABLE IF EXISTS numbers"))
        connection.execute(text("CREATE TABLE numbers (n INTEGER PRIMARY KEY)"))
    return database


def insert(db: Database, *found: int) -> None:
    with db.transaction() as connection:
        connection.execute(text("INSERT INTO numbers VALUES (:n)"), [{"n": n} for n in found])


def read(db: Database) -> list[int]:
    with db.reading() as connection:
        return list(connection.scalars(text("SELECT n FROM numbers ORDER BY n")))


def test_a_transaction_is_all_or_nothing(numbers: Database) -> None:
    with pytest.raises(LookupError), numbers.transaction() as connection:
        connection.execute(text("INSERT INTO numbers VALUES (1)"))
        raise LookupError
    assert read(numbers) == []
    insert(numbers, 2)
    assert read(numbers) == [2]


def test_what_breaks_a_constraint_is_unavailable_and_nothing_is_kept(numbers: Database) -> None:
    with pytest.raises(StoreUnavailable, match=r"SQLITE_CONSTRAINT|23505"):
        insert(numbers, 1, 2, 1)
    assert read(numbers) == []


def test_upgrading_again_changes_nothing(numbers: Database) -> None:
    insert(numbers, 1)
    numbers.upgrade()
    assert read(numbers) == [1]


def test_processes_may_start_with_the_same_new_database(database: Database, tmp_path: Path) -> None:
    if database.is_sqlite:
        url = f"sqlite:///{tmp_path / 'new' / 'service.sqlite3'}"
    else:
        with database.transaction() as connection:
            connection.execute(text("DROP SCHEMA public CASCADE"))
            connection.execute(text("CREATE SCHEMA public"))
        with database.reading() as connection:
            url = connection.engine.url.render_as_string(hide_password=False)
    code = "import sys; from db import Database; from accounts.users import Users; sys.stdin.read(); "
    code += "db = Database(sys.argv[1]); db.upgrade(); Users(db).add(sys.argv[2], 'user', 'hash')"
    ready, go = os.pipe()
    command = [sys.executable, "-c", code, url]
    running = [subprocess.Popen([*command, f"u{i}"], stdin=ready, cwd=ROOT) for i in range(3)]
    os.close(ready)
    os.close(go)  # the end of file for which all wait
    assert [process.wait(60) for process in running] == [0] * 3
    both = Database(url)
    with both.reading() as connection:
        assert connection.scalar(text("SELECT count(*) FROM users")) == 3
    both.close()


def test_threads_take_turns_and_lose_nothing(numbers: Database) -> None:
    def add_next(_: int) -> None:
        with numbers.transaction() as connection:
            if not numbers.is_sqlite:
                connection.execute(text("LOCK TABLE numbers IN EXCLUSIVE MODE"))
            largest = connection.scalar(text("SELECT coalesce(max(n), 0) FROM numbers"))
            connection.execute(text("INSERT INTO numbers VALUES (:n)"), {"n": largest + 1})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add_next, range(80)))
    assert read(numbers) == list(range(1, 81))


class TestSqlite:
    """What concerns the file alone."""

    @pytest.fixture
    def db(self, tmp_path: Path) -> Database:
        db = Database.in_folder(tmp_path / "new folder")
        with db.transaction() as connection:
            connection.execute(text("CREATE TABLE numbers (n INTEGER PRIMARY KEY)"))
        return db

    def test_the_files_are_private_and_durable(self, db: Database, tmp_path: Path) -> None:
        insert(db, 1)
        files = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "new folder").iterdir()}
        assert files == dict.fromkeys(("service.sqlite3", "service.sqlite3-wal", "service.sqlite3-shm"), 0o600)
        with db.reading() as connection:
            assert connection.scalar(text("PRAGMA journal_mode")) == "wal"
            assert connection.scalar(text("PRAGMA synchronous")) == 2  # FULL
            assert connection.scalar(text("PRAGMA foreign_keys")) == 1

    def test_an_open_file_is_made_private(self, tmp_path: Path) -> None:
        path = tmp_path / "service.sqlite3"
        path.touch()
        path.chmod(0o666)
        Database.in_folder(tmp_path)
        assert path.stat().st_mode & 0o777 == 0o600

    def test_a_write_survives_the_death_of_its_process(self, db: Database, tmp_path: Path) -> None:
        code = "import os, sys; from pathlib import Path; from sqlalchemy import text; from db import Database\n"
        code += "with Database.in_folder(Path(sys.argv[1])).transaction() as connection:\n"
        code += "    connection.execute(text('INSERT INTO numbers VALUES (7)'))\nos.kill(os.getpid(), 9)"
        folder = str(tmp_path / "new folder")
        killed = subprocess.run([sys.executable, "-c", code, folder], timeout=30, cwd=ROOT)
        assert killed.returncode == -9
        assert read(db) == [7]

    def test_a_file_that_is_no_database_is_unavailable(self, tmp_path: Path) -> None:
        path = tmp_path / "secret-folder" / "service.sqlite3"
        path.parent.mkdir()
        path.write_bytes(b"not a database, but long enough to be read as one" * 100)
        with pytest.raises(StoreUnavailable, match="SQLITE_NOTADB") as failure:
            Database.in_folder(path.parent).upgrade()
        assert "secret-folder" not in str(failure.value), "clients may see the message"

    def test_a_folder_that_cannot_be_written_is_unavailable(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(StoreUnavailable):
            Database.in_folder(tmp_path / "file")

    def test_a_full_disk_is_unavailable_and_heals_as_soon_as_there_is_room(self, db: Database) -> None:
        insert(db, 1)
        with pytest.raises(StoreUnavailable, match="SQLITE_FULL"), db.transaction() as connection:
            connection.execute(text("PRAGMA max_page_count = 3"))  # SQLite's own way to have a small disk
            connection.execute(text("INSERT INTO numbers VALUES (:n)"), [{"n": n} for n in range(2, 5000)])
        with db.transaction() as connection:
            connection.execute(text("PRAGMA max_page_count = 1000000"))
            connection.execute(text("INSERT INTO numbers VALUES (2)"))
        assert read(db) == [1, 2]

    def test_a_lock_held_too_long_is_unavailable_and_reads_go_on(self, db: Database, tmp_path: Path) -> None:
        impatient = Database(f"sqlite:///{tmp_path / 'new folder' / 'service.sqlite3'}", timeout=0.05)
        with db.transaction():
            with pytest.raises(StoreUnavailable, match="SQLITE_BUSY"):
                insert(impatient, 1)
            assert read(impatient) == []
        insert(impatient, 1)
        assert read(db) == [1]


def test_a_postgresql_that_is_gone_is_unavailable_and_its_password_is_not_told() -> None:
    gone = Database("postgresql+psycopg://llm:hunter2@127.0.0.1:1/llm", timeout=1)
    with pytest.raises(StoreUnavailable) as failure, gone.reading():
        pass
    assert "hunter2" not in str(failure.value) and "127.0.0.1" not in str(failure.value)
