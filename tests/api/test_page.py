"""The page's blueprint with a page of two files, and with none: the service does not need one."""

from __future__ import annotations

import json
from pathlib import Path

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
    assert nobody.get("/").headers["Location"] == "/docs"
    for path in ("/web/js/main.js", "/sw.js"):
        assert_refused(nobody.get(path), 404)


@pytest.mark.parametrize(
    "name", ["../app.py", "%2e%2e/app.py", "js/../../app.py", "notes.txt", "js", "js/none.js", "x\0.js"]
)
def test_nothing_but_the_page_is_served(nobody: Client, web: Path, name: str) -> None:
    (web.parent / "app.py").write_text("secret")
    assert_refused(nobody.get(f"/web/{name}"), 404)


def test_an_unchanged_file_is_not_sent_again(nobody: Client, web: Path) -> None:
    first = nobody.get("/web/js/main.js")
    assert first.headers["Cache-Control"] == "no-cache"
    again = nobody.get("/web/js/main.js", headers={"If-None-Match": first.headers["ETag"]})
    assert (again.status_code, again.data) == (304, b"")


def test_the_worker_is_another_one_as_soon_as_any_file_is(nobody: Client, web: Path) -> None:
    def shell() -> dict[str, object]:
        return json.loads(nobody.get("/sw.js").text.splitlines()[0].removeprefix("const SHELL = ").removesuffix(";"))

    before = shell()
    assert before["files"] == ["/", "/web/js/main.js"]
    (web / "js/main.js").write_text("begin(2);")
    assert shell()["version"] != before["version"]
