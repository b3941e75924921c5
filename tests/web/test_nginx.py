"""The page through nginx, as it is served in production."""

from __future__ import annotations

import gzip

from playwright.sync_api import expect

from tests.stack.client import Door
from tests.stack.conftest import door
from tests.web.conftest import Visit

__all__ = ["door"]  # a fixture of the stack's tests, used here too


def test_the_page_is_served_compressed_with_one_policy(door: Door) -> None:
    stranger = Door(door.stack)
    page = stranger.ask("GET", "/")
    assert (page.status, page.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert len(page.headers.get_all("Content-Security-Policy") or []) == 1
    script = stranger.ask("GET", "/web/js/main.js", headers={"Accept-Encoding": "gzip"})
    assert script.headers["Content-Encoding"] == "gzip" and b"begin()" in gzip.decompress(script.body)


def test_one_chats_through_nginx_and_tls(visit: Visit, door: Door) -> None:
    # A certificate that nobody vouches for is no place for a service worker.
    own = {"ignore_https_errors": True, "service_workers": "block"}
    visitor = visit(f"https://localhost:{door.stack.https}", **own).open().login().inside()
    visitor.page.locator("#tune").click()
    visitor.page.locator("[name=max_new_tokens]").fill("12")
    visitor.page.locator("#tuning .primary").click()
    expect(visitor.ask("Say hello.").locator(".stats")).to_contain_text("tokens/s")
    visitor.page.reload()  # all parts of the page again, at once: not too often for nginx
    expect(visitor.page.locator("#splash")).to_be_hidden()
