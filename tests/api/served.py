"""What gunicorn serves in the tests: the real app, with words that a script or the engine without a model makes."""

from __future__ import annotations

from flask import Flask

import app
from model.engine import engine
from tests.api.scripted import ScriptedBackend


def create() -> Flask:
    return app.create_app(backend=ScriptedBackend())


def poisoned() -> Flask:
    """The real engine, which prompts can make fail. Its patience is seconds, where that of the service is a minute."""
    from tests.model.poisoned import PoisonedBackend

    engine.SILENT_AFTER = 1.0
    app._local = PoisonedBackend
    return app.create_app()
