"""One log a test, on SQLite and on PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from secrets import token_hex

import pytest
from sqlalchemy import create_engine, make_url, text

from tests.audit.logs import Log


@pytest.fixture(params=["sqlite", "postgresql"])
def log(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Log]:
    if request.param == "sqlite":
        yield Log(tmp_path)
        return
    server = make_url(request.getfixturevalue("postgres_url"))
    name = f"audit_{token_hex(4)}"
    engine = create_engine(server, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    engine.dispose()
    made = Log(tmp_path, server.set(database=name).render_as_string(hide_password=False))
    yield made
    made.database.close()
