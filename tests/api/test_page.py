"""The page's routes with a page of two files, and with none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from api.routes import page
from tests.api.conftest import Client, assert_refused


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "web"
    (folder / "js").mkdir(parents=True)
    (folder / "index.html").write_text("<!doctype html><title>page</title>")
    (folder / "sw.js").write_text("self.version = SHELL.version;")
    (folder / "js/main.js").write_text("begin();")
    (folder / "notes.txt").write_text("not for browsers")
    monkeypatch.setattr(page, "WEB", folder)
    return folder


def test_the_page_is_at_the_root(nobody: Client, web: Path) -> None:
    answer = nobody.get("/")
    assert (answer.status_code, answer.mimetype) == (200, "text/html")
    assert "manifest-src 'self'; worker-src 'self'" in answer.headers["Content-Security-Policy"]
    assert nobody.get("/web/js/main.js").mimetype == "text/javascript"


def test_without_a_page_the_root_leads_to_the_documentation(
    nobody: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "WEB", tmp_path / "deleted")
    assert nobody.get("/").headers["Location"] == "docs"
    for path in ("/web/js/main.js", "/sw.js"):
        assert_refused(nobody.get(path), 404)


@pytest.mark.parametrize(
    "name",
    [
        "../app.py",
        "%2e%2e/app.py",
        "js/../../app.py",
        "notes.txt",
        "js",
        "js/none.js",
        "x\0.js",
        f"{'x' * 300}.js",
        f"{'x/' * 3000}.js",
    ],
    ids=lambda name: name[:20],
)
def test_nothing_but_the_page_is_served(nobody: Client, web: Path, name: str) -> None:
    (web.parent / "app.py").write_text("secret")
    assert_refused(nobody.get(f"/web/{name}"), 404)


def test_an_unchanged_file_is_not_sent_again(nobody: Client, web: Path) -> None:
    first = nobody.get("/web/js/main.js")
    assert first.headers["Cache-Control"] == "no-cache"
    again = nobody.get("/web/js/main.js", headers={"If-None-Match": first.headers["ETag"]})
    assert (again.status_code, again.data) == (304, b"")


def shell(nobody: Client) -> dict[str, Any]:
    script = nobody.get("/sw.js").text
    assert script.endswith("self.version = SHELL.version;")
    found: dict[str, Any] = json.loads(script.splitlines()[0].removeprefix("const SHELL = ").removesuffix(";"))
    return found


def test_the_worker_keeps_every_file_and_is_a_new_one_when_any_of_them_changed(nobody: Client, web: Path) -> None:
    before = shell(nobody)
    assert before["files"] == ["./", "web/js/main.js"]
    (web / "js/main.js").write_text("begin(2);")
    page._files.cache_clear()
    assert shell(nobody)["version"] != before["version"]
    assert nobody.get("/web/js/main.js").text == "begin(2);"


def test_a_strangers_requests_read_nothing_from_the_disk(nobody: Client, web: Path) -> None:
    nobody.get("/sw.js")
    shutil.rmtree(web)
    for path in ("/", "/sw.js", "/web/js/main.js"):
        assert nobody.get(path).status_code == 200
