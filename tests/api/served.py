"""What gunicorn serves in the tests: the real app, with words that a script makes."""

from __future__ import annotations

from flask import Flask

from app import create_app
from tests.api.scripted import ScriptedBackend


def create() -> Flask:
    return create_app(backend=ScriptedBackend())
