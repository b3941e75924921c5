"""The pages: the chat in web/, with the list of files that its worker keeps for offline use, and the API's docs."""

from __future__ import annotations

import json
from functools import cache
from hashlib import sha256
from pathlib import Path

from flask import Blueprint, Response, redirect, request

from api.middleware import Reply, public
from errors import NotFound

WEB, DOCS = Path(__file__).parents[2] / "web", Path(__file__).parents[1] / "static"
_WORKER = "sw.js"
_TYPES = {  # the machine's own table may differ, and nosniff is strict
    ".css": "text/css", ".html": "text/html", ".js": "text/javascript", ".mjs": "text/javascript", ".png": "image/png",
    ".svg": "image/svg+xml", ".webmanifest": "application/manifest+json",
}  # fmt: skip

blueprint = Blueprint("page", __name__)


@blueprint.get("/")
@public
def home() -> Reply:
    return _send(WEB, "index.html") if "index.html" in _files(WEB) else redirect("docs")


@blueprint.get("/web/<path:name>")
@public
def part(name: str) -> Reply:
    return _send(WEB, name)


@blueprint.get(f"/{_WORKER}")
@public
def worker() -> Reply:
    """At the root, because a service worker controls only what lies below its own address."""
    return _send(WEB, _WORKER)


@blueprint.get("/docs")
@public
def docs() -> Reply:
    return _send(DOCS, "docs.html")


@blueprint.get("/docs/<name>")
@public
def docs_file(name: str) -> Reply:
    return _send(DOCS, name)


@cache
def _files(folder: Path) -> dict[str, bytes]:
    """Every file of a page by its path in `folder`. Read once, so a name from a request never reaches the disk."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix in _TYPES)
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    if script := files.pop(_WORKER, None):
        files[_WORKER] = f"const SHELL = {json.dumps(_shell(files))};\n".encode() + script
    return files


def _shell(files: dict[str, bytes]) -> dict[str, object]:
    """What the worker keeps, relative to its own address, and a version that changes with any of it.

    The worker's first line holds it: a browser takes a worker for a new one when a byte of it differs.
    """
    version = _digest("".join(f"{name} {_digest(content)}\n" for name, content in files.items()).encode())
    return {"version": version, "files": ["./", *(f"web/{name}" for name in files if name != "index.html")]}


def _digest(content: bytes) -> str:
    return sha256(content).hexdigest()[:16]


def _send(folder: Path, name: str) -> Reply:
    """Asked for anew each time and sent only when it changed, so that a page is never made of two versions."""
    content = _files(folder).get(name)
    if content is None:
        raise NotFound("There is nothing at this address.")
    response = Response(content, mimetype=_TYPES[Path(name).suffix])
    response.headers["Cache-Control"] = "no-cache"
    response.set_etag(_digest(content))  # the largest file takes 0.1 ms
    return response.make_conditional(request)
