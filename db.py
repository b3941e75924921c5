"""One SQL database for everything that must not be lost: SQLite in DATA_DIR, or PostgreSQL by DATABASE_URL."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, Engine, MetaData, create_engine, event, inspect, make_url, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from errors import StoreUnavailable

metadata = MetaData()  # each feature declares its tables on it

_BUSY = 5.0  # seconds to wait for another writer; ours hold the lock for milliseconds
_POOL = 20  # connections kept open; more are opened while more threads ask at once
_MIGRATION_LOCK = 7_235_401  # any number, the same in all replicas


class Database:
    """A pool of connections to the database at `url`, for any number of threads and processes.

    Every method raises StoreUnavailable when the database cannot be used.
    """

    def __init__(self, url: str | URL, timeout: float = _BUSY) -> None:
        """timeout: seconds to wait for a lock, and for PostgreSQL to connect and to answer."""
        address = make_url(url)
        self.is_sqlite = address.get_backend_name() == "sqlite"
        with failures():
            if self.is_sqlite and address.database:
                _make_private(Path(address.database))
            self._writer = _engine(address, timeout)
            self._reader = _engine(address, timeout, isolation_level="AUTOCOMMIT", pool_reset_on_return=None)
        # SQLite's waiting writers poll, and may miss their turn for most of a second beside busy threads.
        self._alone: AbstractContextManager[object] = threading.Lock() if self.is_sqlite else nullcontext()
        if self.is_sqlite:
            event.listen(self._writer, "begin", _begin_immediate)

    @classmethod
    def in_folder(cls, folder: Path) -> Database:
        """The SQLite database of a DATA_DIR, made there (mode 600) when it is missing."""
        return cls(URL.create("sqlite", database=str(folder / "service.sqlite3")))

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """All or nothing. On SQLite the write lock is taken first, so what is read inside stays true."""
        with failures(), self._alone, self._writer.begin() as connection:
            yield connection

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection for reads, each a transaction of its own."""
        with failures(), self._reader.connect() as connection:
            yield connection

    def upgrade(self) -> None:
        """Make the tables of all imported features, or bring older ones up to date; one process at a time does it."""
        with failures(), self._writer.begin() as connection:
            if not self.is_sqlite:
                connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _MIGRATION_LOCK})
            config = Config(attributes={"connection": connection})
            config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
            if inspect(connection).has_table("alembic_version"):
                command.upgrade(config, "head")
            else:  # a new database needs none of the steps
                metadata.create_all(connection)
                command.stamp(config, "head")

    def close(self) -> None:
        """Close every connection. A later call opens new ones."""
        self._writer.dispose()
        self._reader.dispose()


@contextmanager
def failures() -> Iterator[None]:
    """Turn what the driver raises into StoreUnavailable, which never holds a statement or its values."""
    try:
        yield
    except (SQLAlchemyError, sqlite3.Error, OSError) as error:
        cause = error.orig if isinstance(error, DBAPIError) else error
        reason = getattr(cause, "sqlite_errorname", None) or getattr(cause, "sqlstate", None) or type(cause).__name__
        raise StoreUnavailable(f"the database does not answer ({reason})") from error


def _engine(address: URL, timeout: float, **options: Any) -> Engine:
    if address.get_backend_name() == "sqlite":
        driver: dict[str, Any] = {"timeout": timeout, "check_same_thread": False}
        engine = create_engine(address, connect_args=driver, pool_size=_POOL, max_overflow=-1, **options)
        event.listen(engine, "connect", _prepare_sqlite)
        return engine
    milliseconds = int(timeout * 1000)
    settings = f"-c statement_timeout={milliseconds} -c lock_timeout={milliseconds}"
    driver = {"connect_timeout": max(1, int(timeout)), "options": settings}
    options |= {"pool_size": _POOL, "max_overflow": _POOL, "pool_timeout": timeout, "pool_pre_ping": True}
    return create_engine(address, connect_args=driver, **options)


def _prepare_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # the driver's own BEGIN is deferred and could not wait for a lock
    connection.execute("PRAGMA journal_mode=WAL").fetchone()
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA foreign_keys=ON")


def _begin_immediate(connection: Connection) -> None:
    connection.connection.cursor().execute("BEGIN IMMEDIATE")  # the driver's own cursor: 40 us less a transaction


def _make_private(path: Path) -> None:
    """Mode 600; SQLite gives its -wal and -shm files the mode of the database."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600)) as file:
        os.fchmod(file.fileno(), 0o600)
