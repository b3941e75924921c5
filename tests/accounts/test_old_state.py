"""A DATA_DIR of the version before the SQL database opens: old_state.sql is the dump of one that it made."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import jwt
import pytest
from flask import Flask
from sqlalchemy import text

from accounts.credentials import Credentials
from accounts.old_state import Days, import_old_state
from accounts.users import UserLimits, Users
from api.context import NAME
from crypto import derive
from db import Database
from tests.api.conftest import PASSWORD, Client, backend, make_app

__all__ = ["backend", "make_app"]  # fixtures

SECRET = bytes.fromhex("8a8524519405be507e0ace242357c6aee740c0cd85df479fa894f96cc3d22f34")
JTI = "543a864912bf4a4f937dcde58cb06145"  # of ann's key
DAY = 20_782


def old_folder(folder: Path) -> Path:
    """Makes what the old version left in `folder`, its key still young. Returns the old database."""
    path = folder / "state.sqlite3"
    with closing(sqlite3.connect(path)) as old:
        old.executescript((Path(__file__).parent / "old_state.sql").read_text())
        old.execute("UPDATE api_keys SET expires = ?", (time.time() + 86_400,))
        old.commit()
    (folder / "secret").write_bytes(SECRET)
    (folder / "secret").chmod(0o600)
    return path


def old_token(jti: str = JTI) -> str:
    """The token of a key, as the old version made it: it names its owner."""
    claims = {"fresh": False, "type": "key", "sub": "ann", "jti": jti, "csrf": "x", "aud": NAME, "iss": NAME}
    return jwt.encode({**claims, "exp": int(time.time()) + 3600}, derive(SECRET, "jwt"), "HS256")


def test_users_and_keys_of_an_old_folder_work(make_app: Callable[..., Flask], tmp_path: Path) -> None:
    path = old_folder(tmp_path)
    for _ in range(2):  # the second start finds nothing to import
        nobody = Client(make_app(admin_password="another password"))
        admin, ann = nobody.login("admin"), nobody.login("ann")
        listed = {user["username"]: user for user in admin.get("/admin/users").json["users"]}
        assert {name: (user["role"], user["disabled"]) for name, user in listed.items()} == {
            "admin": ("admin", False), "ann": ("user", False), "bob": ("user", True), "eve": ("auditor", False),
        }  # fmt: skip
        assert listed["ann"]["own_limits"] == {"streams": None, "rpm": 7, "tokens_per_day": 5000}
        assert nobody.post("/login", {"username": "bob", "password": PASSWORD}).status_code == 401
        assert Client(nobody.app, old_token()).post("/generate", {"prompt": "hi"}).status_code == 200
        assert [key["name"] for key in ann.get("/keys").json["keys"]] == ["laptop"]
        assert not path.exists() and path.with_name("state.sqlite3.imported").exists()
    ann.ask("DELETE", f"/keys/{ann.get('/keys').json['keys'][0]['id']}")
    assert Client(nobody.app, old_token()).get("/v1/models").status_code == 401


def test_revoked_keys_stay_revoked_and_tokens_of_a_day_are_handed_over(database: Database, tmp_path: Path) -> None:
    path, handed = old_folder(tmp_path), []
    assert import_old_state(database, path, lambda _, days: handed.append(days))
    ann = Users(database).get("ann")
    assert ann.limits == UserLimits(None, 7, 5000)
    assert handed == [[(ann.id, DAY, 118)]], "what was settled, and what was reserved at the end"
    credentials = Credentials(database, derive(SECRET, "api keys"), 1000)
    assert [key.name for key in credentials.keys(ann.id, time.time())] == ["laptop"]
    assert not import_old_state(database, path, lambda _, days: handed.append(days)) and len(handed) == 1


def test_an_import_that_was_cut_short_begins_again_or_only_renames(database: Database, tmp_path: Path) -> None:
    path = old_folder(tmp_path)

    def cut(_: object, days: Days) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_old_state(database, path, cut)
    assert path.exists() and len(Users(database).page()) == 0
    import_old_state(database, path, lambda *_: None)
    path.with_name("state.sqlite3.imported").rename(path)  # as if the process had ended before the renaming
    ids = [user.id for user in Users(database).page()]
    assert import_old_state(database, path, cut) and [user.id for user in Users(database).page()] == ids


def test_a_first_version_without_limits_is_imported_too(database: Database, tmp_path: Path) -> None:
    path = old_folder(tmp_path)
    with closing(sqlite3.connect(path)) as old:
        for column in ("streams", "rpm", "tokens_per_day"):
            old.execute(f"ALTER TABLE users DROP COLUMN {column}")
        old.executescript("DROP TABLE days; DROP TABLE reservations; PRAGMA user_version=1")
    handed: list[Days] = []
    import_old_state(database, path, lambda _, days: handed.append(days))
    assert Users(database).get("ann").limits == UserLimits() and handed == [[]]


def test_an_old_folder_moves_to_postgresql(make_app: Callable[..., Flask], tmp_path: Path, postgres_url: str) -> None:
    db = Database(postgres_url)
    with db.transaction() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    db.close()
    old_folder(tmp_path)
    nobody = Client(make_app(database_url=postgres_url))
    assert not (tmp_path / "service.sqlite3").exists()
    ann = nobody.login("ann")
    assert ann.post("/generate", {"prompt": "hi"}).status_code == 200
    assert Client(nobody.app, old_token()).get("/v1/models").status_code == 200
    ann.post("/logout")
    assert ann.get("/keys").status_code == 401
    nobody.app.extensions[NAME].users._db.close()
