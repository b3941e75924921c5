"""What gunicorn serves here: the real app over the scripted backend, with room for long answers, and with the page's
files from a folder that a test may change.
"""

from __future__ import annotations

from pathlib import Path

from flask import Flask

from api.routes import page
from tests.api import scripted, served


def create(folder: str = "") -> Flask:
    scripted.CONTEXT = 1 << 20
    page.WEB = Path(folder) if folder else page.WEB
    return served.create()
