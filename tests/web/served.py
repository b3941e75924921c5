"""The app of these tests: the real one over the scripted backend, with a context long enough for any answer.

With `folder`, the page's files come from there and are read at every request, so that a test may change them.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from flask import Flask

from api.routes import page
from tests.api import scripted, served


def create(folder: str = "") -> Flask:
    scripted.CONTEXT = 1 << 20
    if folder:
        page.WEB, page._files = Path(folder), lru_cache(maxsize=0)(page._files.__wrapped__)
    return served.create()
