"""The real app and its audit log over words from a script, in a process that the test kills; and what it left."""

from __future__ import annotations

from multiprocessing.connection import Connection
from pathlib import Path

from argon2 import PasswordHasher
from werkzeug.serving import make_server

import app
from accounts.passwords import Passwords
from api import context
from audit.log import AuditLog
from audit.verify import verify
from crypto import KeyRing
from db import Database
from settings import Settings
from tests.api.scripted import ScriptedBackend
from tests.audit.logs import find


def serve(folder: Path, password: str, port: Connection) -> None:
    """Tells its port, and answers until it is killed."""
    cheap = PasswordHasher(time_cost=1, memory_cost=64, parallelism=1)
    context.Passwords = lambda: Passwords(cheap)  # type: ignore[assignment, misc]
    settings = Settings(data_dir=folder, admin_password=password, user_rpm=100_000, user_streams=100, log_level="error")
    server = make_server("127.0.0.1", 0, app.create_app(settings, ScriptedBackend()), threaded=True)
    port.send(server.port)
    server.serve_forever()


class Remains:
    """The log in a data folder after the last kill, once the next process has opened it."""

    def __init__(self, folder: Path) -> None:
        keys = KeyRing.load_or_create(folder / "keys").mac_keys("audit")
        log = AuditLog(Database.in_folder(folder), keys, folder)
        log.open()
        self.starts = {record["request"]: record["id"] for record in find(log, kind="start")}
        self.outcomes = {record["id"]: record["outcome"] for record in find(log, kind="end")}
        self.complete = self if set(self.starts.values()) == set(self.outcomes) else None
        self.report = verify(log.database, keys, log.head_path)
