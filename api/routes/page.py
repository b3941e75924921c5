"""The chat page: the files of web/, and the list of them that its service worker keeps for offline use.

Needs none of them: without that folder, `/` leads to the documentation.
"""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

from flask import Response, redirect, request
from flask_openapi3.blueprint import APIBlueprint
from werkzeug.security import safe_join

from api.middleware import Reply, public
from api.schemas.native import FilePath
from errors import NotFound

WEB = Path(__file__).parents[2] / "web"
_WORKER = "sw.js"
# What a browser is given, and as what: the machine's own table of types may differ, and nosniff is strict.
_TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".mjs": "text/javascript",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".webmanifest": "application/manifest+json",
}

blueprint = APIBlueprint("page", __name__)


@blueprint.get("/", doc_ui=False)
@public
def home() -> Reply:
    return _file("index.html") if (WEB / "index.html").is_file() else redirect("/docs")


@blueprint.get("/web/<path:name>", doc_ui=False)
@public
def part(path: FilePath) -> Reply:
    return _file(path.name)


@blueprint.get(f"/{_WORKER}", doc_ui=False)
@public
def worker() -> Reply:
    """At the root, because a service worker sees only what lies below its own address.

    Its first line is written here: a browser takes a worker for a new one when a byte of it differs.
    """
    script = _read(_WORKER)
    return _answer(f"const SHELL = {json.dumps(shell())};\n".encode() + script, "text/javascript")


def shell() -> dict[str, object]:
    """Every file of the page, and a version that changes when any of them does."""
    files = sorted(path for path in WEB.rglob("*") if path.suffix in _TYPES and path.name != _WORKER)
    digest = sha256()
    for path in files:
        digest.update(f"{path.relative_to(WEB)} {sha256(path.read_bytes()).hexdigest()}\n".encode())
    addresses = [f"/web/{path.relative_to(WEB)}" for path in files if path.name != "index.html"]
    return {"version": digest.hexdigest()[:12], "files": ["/", *addresses]}


def _file(name: str) -> Reply:
    content = _read(name)
    return _answer(content, _TYPES[Path(name).suffix])


def _read(name: str) -> bytes:
    path = safe_join(str(WEB), name)
    if path is None or Path(path).suffix not in _TYPES or not Path(path).is_file():
        raise NotFound("There is nothing at this address.")
    return Path(path).read_bytes()


def _answer(content: bytes, kind: str) -> Reply:
    """Asked for anew each time, and sent only when it changed: a page is never made of two versions."""
    response = Response(content, mimetype=kind)
    response.headers["Cache-Control"] = "no-cache"
    response.set_etag(sha256(content).hexdigest()[:16])
    return response.make_conditional(request)
