"""The real app and its audit log over words from a script, in a process that the test kills; and what it left."""

from __future__ import annotations

from multiprocessing.connection import Connection
from pathlib import Path

from argon2 import PasswordHasher
from audit.audit import Audit, Wanted
from audit.journal import Journal
from audit.tail import Place
from werkzeug.serving import make_server

import app
from accounts.passwords import Passwords
from audit.verify import verify
from keys import KeyRing
from settings import Settings
from tests.api.scripted import ScriptedBackend


def serve(folder: Path, password: str, port: Connection) -> None:
    """Tells its port, and answers until it is killed."""
    cheap = PasswordHasher(time_cost=1, memory_cost=64, parallelism=1)
    app.Passwords = lambda: Passwords(cheap)  # type: ignore[assignment]
    settings = Settings(data_dir=folder, admin_password=password, user_rpm=100_000, user_streams=100, log_level="error")
    server = make_server("127.0.0.1", 0, app.create_app(settings, ScriptedBackend()), threaded=True)
    port.send(server.port)
    server.serve_forever()


class Remains:
    """The log in a data folder after the last kill, once the next process has opened it."""

    def __init__(self, folder: Path) -> None:
        codes = KeyRing.load_or_create(folder / "keys").codes("audit")
        place = Place(folder / "audit", folder / "audit-head", codes)
        audit = Audit(Journal(place))
        audit.open()
        self.starts = {record["request"]: record["id"] for record in audit.find(Wanted({"kind": "start"}))}
        self.outcomes = {record["id"]: record["outcome"] for record in audit.find(Wanted({"kind": "end"}))}
        self.complete = self if set(self.starts.values()) == set(self.outcomes) else None
        self.report = verify(place.folder, place.head, place.signer)
