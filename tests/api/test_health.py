"""Liveness, readiness, metrics, the headers of every answer, and the documentation."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from api.context import SET_ASIDE, Services
from api.middleware import public
from model.types import BackendStatus
from tests.api.conftest import Client
from tests.api.scripted import ScriptedBackend
from version import VERSION


def test_alive_and_ready(nobody: Client, backend: ScriptedBackend) -> None:
    assert nobody.get("/healthz").json == {"status": "ok", "version": VERSION}
    ready = nobody.get("/readyz")
    assert ready.status_code == 200
    assert set(ready.json) == {"ready", "stage", "percent", "reason", "details"}
    backend.close(0)
    stopping = nobody.get("/readyz")
    assert (stopping.status_code, stopping.json["stage"], stopping.headers["Retry-After"]) == (503, "stopping", "1")
    assert nobody.get("/healthz").status_code == 200


def test_not_ready_when_the_database_does_not_answer(nobody: Client, services: Services, tmp_path: Path) -> None:
    services.database.close()
    for file in tmp_path.glob("service.sqlite3*"):
        file.write_bytes(b"no database " * 1000)
    answer = nobody.get("/readyz")
    assert (answer.status_code, answer.json["ready"], answer.json["stage"]) == (503, False, "unavailable")
    assert answer.json["reason"] == "the database does not answer (SQLITE_NOTADB)"
    assert nobody.get("/healthz").status_code == 200


def test_a_full_disk_leaves_room_for_revoking_and_heals(
    admin: Client,
    add_user: Callable[..., Client],
    services: Services,
    backend: ScriptedBackend,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    user = add_user("ann")
    whole = shutil.disk_usage(services.settings.data_dir)
    free = [SET_ASIDE - 1]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: whole._replace(free=free[0]))
    refused = user.post("/generate", {"prompt": "hi"})
    assert (refused.status_code, refused.json["error"]["code"]) == (503, "store_unavailable") and not backend.submitted
    assert admin.get("/readyz").json["reason"] == "the disk is full"
    assert admin.ask("PATCH", "/admin/users/ann", {"disabled": True}).status_code == 200
    assert user.get("/v1/models").status_code == 401
    free[0] = SET_ASIDE
    assert admin.post("/generate", {"prompt": "hi"}).status_code == 200 and admin.get("/readyz").status_code == 200


def test_not_ready_when_the_audit_cannot_be_written(
    nobody: Client, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(services.audit), "problem", lambda self: "no space left")
    answer = nobody.get("/readyz")
    assert (answer.status_code, answer.json["stage"]) == (503, "unavailable")
    assert answer.json["reason"] == "the audit log cannot be written: no space left"


def test_not_ready_when_the_model_failed_and_its_reason_comes_first(
    nobody: Client, services: Services, backend: ScriptedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = BackendStatus(False, "failed", reason="the model has no chat template")
    monkeypatch.setattr(backend, "status", lambda: failed)
    monkeypatch.setattr(type(services.audit), "problem", lambda self: "no space left")
    answer = nobody.get("/readyz")
    assert (answer.status_code, answer.json["stage"]) == (503, "failed")
    assert answer.json["reason"] == "the model has no chat template"


def test_a_cache_that_fails_is_shown_and_costs_no_readiness(
    nobody: Client, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(services.cache), "problem", lambda self: "password")
    answer = nobody.get("/readyz")
    assert (answer.status_code, answer.json["ready"]) == (200, True)
    assert answer.json["details"]["cache_problem"] == "password"


def test_a_stopping_service_refuses_with_a_time_to_come_back(admin: Client, backend: ScriptedBackend) -> None:
    backend.close(0)
    answer = admin.post("/generate", {"prompt": "hi"})
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")


def test_metrics_count_by_route_and_never_by_what_a_client_wrote(admin: Client) -> None:
    for path in ("/one", "/two?x=secret"):
        admin.get(path)
    admin.ask("DELETE", "/requests/some-id")
    admin.ask("BREW", "/generate")
    for _ in range(2):
        admin.post("/generate", {"prompt": "hi", "temperature": 0})
    text = admin.get("/metrics").text
    assert 'url_rule="/requests/<id>"' in text and 'url_rule="/generate"' in text
    assert 'llm_cache_lookups_total{result="hit"} 1.0' in text
    assert not any(word in text for word in ("some-id", "/one", "/two", "secret", "BREW"))


@pytest.mark.parametrize("path", ["/healthz", "/keys", "/nowhere", "/docs", "/docs/docs.js", "/metrics"])
def test_every_answer_carries_the_safe_headers(nobody: Client, path: str) -> None:
    headers = nobody.get(path).headers
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self';")
    assert headers["X-Request-Id"] and headers["Cache-Control"]


def test_answers_are_not_stored_by_browsers(admin: Client) -> None:
    assert admin.get("/keys").headers["Cache-Control"] == "no-store"


def test_the_documentation_page_needs_nothing_from_elsewhere(nobody: Client) -> None:
    page = nobody.get("/docs")
    assert page.status_code == 200 and "<script>" not in page.text and "style=" not in page.text
    links = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(links) >= 3
    for link in links:
        assert not link.startswith(("http:", "https:", "//"))
        assert nobody.get("/" + link).status_code == 200


def document(nobody: Client) -> dict[str, Any]:
    answer = nobody.get("/openapi.json")
    assert answer.status_code == 200
    return answer.json


def test_the_document_lists_every_route_with_its_token(nobody: Client, services: Services) -> None:
    found = document(nobody)
    assert found["openapi"].startswith("3.1")
    rules = {re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule) for rule in nobody.app.url_map.iter_rules()}
    undocumented = {"/", "/sw.js", "/web/{name}", "/docs", "/docs/{name}", "/openapi.json", "/metrics"}
    assert set(found["paths"]) == rules - undocumented
    for path, methods in found["paths"].items():
        for method, operation in methods.items():
            is_public = (method, path) in {("post", "/login"), ("get", "/stream")} or path.endswith("z")
            assert bool(operation.get("security")) is not is_public, (method, path)


def test_every_reference_of_the_document_leads_somewhere(nobody: Client) -> None:
    found = document(nobody)
    names = set(re.findall(r'"#/components/schemas/([^"]+)"', nobody.get("/openapi.json").text))
    assert names and names <= set(found["components"]["schemas"])


def test_the_document_states_the_bounds(nobody: Client) -> None:
    fields = document(nobody)["components"]["schemas"]["GenerateBody"]["properties"]
    assert (fields["max_new_tokens"]["minimum"], fields["max_new_tokens"]["default"]) == (1, 256)
    assert fields["top_k"]["maximum"] == 1 << 20 and "256" in fields["top_k"]["description"]


def test_an_answer_with_a_number_that_is_none_is_a_500_and_never_sent(app: Flask, nobody: Client) -> None:
    app.view_functions["nan"] = public(lambda: {"value": float("nan")})
    app.url_map.add(app.url_rule_class("/nan", endpoint="nan"))
    answer = nobody.get("/nan")
    assert (answer.status_code, answer.json["error"]["type"]) == (500, "server_error")
