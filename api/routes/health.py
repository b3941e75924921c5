"""Is it alive, is it ready, and how is it spoken to.

Liveness touches nothing: a process that waits for its disk is not helped by a restart.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from functools import wraps
from pathlib import Path

from flask import Response, current_app, request
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag

from api.context import services
from api.errors import ErrorBody
from api.middleware import Reply, public
from api.schemas.native import FilePath, HealthOut, ReadyOut
from errors import Forbidden, NotFound

_STATIC = Path(__file__).parents[1] / "static"
_PAGES = {"docs.html": "text/html", "docs.css": "text/css", "docs.js": "text/javascript"}

blueprint = APIBlueprint("health", __name__, abp_tags=[Tag(name="Operations")], abp_responses={400: ErrorBody})


@blueprint.get("/healthz", responses={200: HealthOut})
@public
def healthz() -> Reply:
    """The process answers."""
    return HealthOut().model_dump()


@blueprint.get("/readyz", responses={200: ReadyOut, 503: ReadyOut})
@public
def readyz() -> Reply:
    """Whether text can be made, and if not, what is being waited for."""
    status = services().backend.status()
    out = ReadyOut(
        ready=status.ready,
        stage=status.stage,
        percent=status.percent,
        reason=status.reason,
        details=dict(status.details),
    )
    return out.model_dump(), 200 if status.ready else 503


@blueprint.get("/openapi.json", doc_ui=False)
@public
def openapi() -> Reply:
    document: dict[str, object] = current_app.api_doc  # type: ignore[attr-defined]
    return document


@blueprint.get("/docs", doc_ui=False)
@public
def docs() -> Reply:
    return _page("docs.html")


@blueprint.get("/docs/<name>", doc_ui=False)
@public
def docs_file(path: FilePath) -> Reply:
    return _page(path.name)


def _page(name: str) -> Response:
    if name not in _PAGES:
        raise NotFound("There is nothing at this address.")
    return Response((_STATIC / name).read_bytes(), mimetype=_PAGES[name])


def scrapers(view: Callable[[], Reply]) -> Callable[[], Reply]:
    """Serve `view` to this machine and METRICS_NETWORKS only; nginx refuses it to everybody."""

    @public
    @wraps(view)
    def guarded() -> Reply:
        if not _may_scrape(request.remote_addr or ""):
            raise Forbidden("Metrics are for this machine; METRICS_NETWORKS adds others.")
        return view()

    return guarded


def _may_scrape(address: str) -> bool:
    try:
        given = ipaddress.ip_address(address)
    except ValueError:  # none, or what a client wrote into X-Forwarded-For
        return False
    ip = getattr(given, "ipv4_mapped", None) or given
    return ip.is_loopback or any(ip in network for network in services().settings.metrics_networks)
