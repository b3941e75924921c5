"""Liveness, readiness, the API's description and who may read the metrics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import wraps

from flask import current_app, request
from sqlalchemy import text

from api.context import services
from api.middleware import Reply, api_blueprint, ip_address, public
from api.schemas.native import HealthOut, ReadyOut
from errors import Forbidden, StoreUnavailable
from version import VERSION

_PING = text("SELECT count(*) FROM alembic_version")  # SQLite answers SELECT 1 without its file
blueprint = api_blueprint("health", "Operations", 400, secured=False)


@blueprint.get("/healthz", responses={200: HealthOut})
@public
def healthz() -> Reply:
    """The process answers. Touches nothing else: a restart does not help a process that waits for its disk."""
    return {"status": "ok", "version": VERSION}


@blueprint.get("/readyz", responses={200: ReadyOut, 503: ReadyOut})
@public
def readyz() -> Reply:
    """Whether a request can be answered with text now; if not, the reason, and the stage of the model."""
    status, problem = services().backend.status(), _problem()
    if problem:
        stage = "unavailable" if status.ready else status.stage
        status = replace(status, ready=False, stage=stage, reason=status.reason or problem)
    if cache_problem := services().cache.problem():  # costs speed only
        status = replace(status, details={**status.details, "cache_problem": cache_problem})
    return asdict(status), 200 if status.ready else 503


def _problem() -> str | None:
    """Why requests are refused although the model is ready, None if they are not."""
    try:
        services().check_space()
        with services().database.reading() as connection:
            connection.execute(_PING)
    except StoreUnavailable as error:
        return error.detail
    if fault := services().audit.problem():
        return f"the audit log cannot be written: {fault}"
    return None


@blueprint.get("/openapi.json", doc_ui=False)
@public
def openapi() -> Reply:
    document: dict[str, object] = current_app.api_doc  # type: ignore[attr-defined]
    return document


def scrapers(view: Callable[[], Reply]) -> Callable[[], Reply]:
    """Serve `view` to this machine and METRICS_NETWORKS only; nginx passes it to no one."""

    @public
    @wraps(view)
    def guarded() -> Reply:
        if not _may_scrape(request.remote_addr or ""):
            raise Forbidden("Metrics are for this machine; METRICS_NETWORKS adds others.")
        return view()

    return guarded


def _may_scrape(address: str) -> bool:
    given = ip_address(address)  # what a client wrote into X-Forwarded-For may be anything
    ip = getattr(given, "ipv4_mapped", None) or given
    return ip is not None and (ip.is_loopback or any(ip in net for net in services().settings.metrics_networks))
